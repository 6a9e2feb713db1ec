"""Whole blocks removed one after the other: what a step tries, and the order that its rows give."""

from collections.abc import Sequence

from storage.records import ScoreRow
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.removals import candidates, removal, removal_order, without

PARENT = [Replacement(block, 1, Attention("gqa", 2), Ffn("gated", 96)) for block in range(4)]


def test_a_step_tries_the_four_blocks_that_harm_least_alone() -> None:
    scores = {0: 0.5, 1: 0.1, 2: 0.2, 3: 0.4, 4: 0.3, 5: 0.6}
    assert candidates(scores, []) == [1, 2, 3, 4]
    assert candidates(scores, [4, 1]) == [0, 2, 3, 5]
    assert candidates(scores, [0, 1, 2, 3]) == [4, 5]


def rows(removed: Sequence[int], replacement: Replacement, *kls: float, tokens: int = 8) -> list[ScoreRow]:
    """Return a row for each sequence of a replacement around the parent without some blocks."""
    return [
        ScoreRow(
            first_block=replacement.first_block,
            span=1,
            attention=replacement.attention.name,
            ffn=replacement.ffn.name,
            weights="decoupled",
            weights_hash="",
            around=without(PARENT, removed).digest,
            sequence_shard=shard,
            document=shard,
            tokens=tokens,
            kl=kl,
            lm_loss=3.0,
            top1_agreement=0.9,
            cosine=0.9,
        )
        for shard, kl in enumerate(kls)
    ]


def test_the_order_is_that_of_the_least_joint_kl_as_far_as_rows_go() -> None:
    first = [*rows([], removal(0), 0.4, 0.2), *rows([], removal(2), 0.1, 0.3), *rows([], removal(3), 0.5, 0.1)]
    second = [*rows([2], removal(0), 0.9), *rows([2], removal(3), 0.7)]
    elsewhere = rows([0], removal(1), 0.01)  # around blocks that the order does not begin with
    narrower = rows([], Replacement(1, 1, PARENT[1].attention, Ffn("no_op")), 0.01)
    assert removal_order([*first, *second, *elsewhere, *narrower], PARENT) == (2, 3)
    assert removal_order([*second, *elsewhere], PARENT) == ()


def test_equal_kls_go_to_the_earlier_block_and_sequences_count_by_tokens() -> None:
    assert removal_order([*rows([], removal(3), 0.2), *rows([], removal(1), 0.2)], PARENT) == (1,)
    long = [*rows([], removal(3), 0.1), *rows([], removal(3), 0.5, tokens=24)]  # 0.4 over tokens
    assert removal_order([*long, *rows([], removal(1), 0.35)], PARENT) == (1,)
