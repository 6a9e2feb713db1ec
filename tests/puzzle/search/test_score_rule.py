"""The score rule and the statistics of scores, against hand-computed cases."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.files import InputError
from storage.records import ScoreRow, Weights
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.search.score_rule import Scores

FULL_A, FULL_F = Attention("gqa", 4), Ffn("gated", 64)
KV_1, NARROW, NO_A, NO_F = Attention("gqa", 1), Ffn("gated", 32), Attention("no_op"), Ffn("no_op")


def _row(
    kl: float,
    attention: Attention = FULL_A,
    ffn: Ffn = FULL_F,
    *,
    block: int = 0,
    span: int = 1,
    shard: int = 0,
    document: int | None = None,
    tokens: int = 100,
    weights: Weights = "decoupled",
    around: str = "parent",
) -> ScoreRow:
    return ScoreRow(
        block,
        span,
        attention.name,
        ffn.name,
        weights,
        "",
        around,
        shard,
        shard if document is None else document,
        tokens,
        kl,
        lm_loss=3.0,
        top1_agreement=0.9,
        cosine=0.9,
    )


def _scores(*rows: ScoreRow) -> Scores:
    return Scores(rows, FULL_A, FULL_F)


def test_the_parents_own_block_scores_0() -> None:
    scores = _scores(_row(1e-7))  # a measured identity is a check of the scorer, not a score
    assert scores.score(Replacement(0, 1, FULL_A, FULL_F), "decoupled").mean == 0


def test_a_pair_is_the_sum_of_its_halves_unless_it_was_measured() -> None:
    halves = (_row(0.25, KV_1), _row(0.5, ffn=NARROW))
    pair = Replacement(0, 1, KV_1, NARROW)
    assert _scores(*halves).score(pair, "decoupled").mean == 0.75
    assert _scores(*halves, _row(1.0, KV_1, NARROW)).score(pair, "decoupled").mean == 1.0


def test_a_span_adds_differences_to_its_full_replacement() -> None:
    """DESIGN.md: s(full, full) + [s(a, full) - s(full, full)] + [s(full, f) - s(full, full)]."""
    scores = _scores(_row(1.0, span=2), _row(1.5, KV_1, span=2), _row(1.25, ffn=NARROW, span=2))
    assert scores.score(Replacement(0, 2, KV_1, NARROW), "decoupled").mean == 1.75
    assert scores.score(Replacement(0, 2, FULL_A, FULL_F), "decoupled").mean == 1.0
    with pytest.raises(InputError, match="blocks 0-1"):
        _scores(_row(1.5, KV_1, span=2)).score(Replacement(0, 2, KV_1, NARROW), "decoupled")


def test_shards_are_weighted_by_tokens() -> None:
    scores = _scores(_row(0.1, KV_1, shard=0, tokens=100), _row(0.4, KV_1, shard=1, tokens=300))
    assert scores.score(Replacement(0, 1, KV_1, FULL_F), "decoupled").mean == pytest.approx((0.1 + 3 * 0.4) / 4)


def test_standard_error_with_equal_weights_is_the_textbook_one() -> None:
    values = [0.1, 0.3, 0.2, 0.6]
    scores = _scores(*(_row(value, KV_1, shard=shard) for shard, value in enumerate(values)))
    score = scores.score(Replacement(0, 1, KV_1, FULL_F), "decoupled")
    variance = sum((value - 0.3) ** 2 for value in values) / 3
    assert score.stderr == pytest.approx(math.sqrt(variance / 4))


def test_one_shard_has_no_standard_error() -> None:
    assert _scores(_row(0.1, KV_1)).score(Replacement(0, 1, KV_1, FULL_F), "decoupled").stderr is None


def test_shards_of_a_document_count_as_one_draw() -> None:
    twice = [_row(kl, KV_1, shard=shard, document=shard // 2) for shard, kl in enumerate((0.1, 0.1, 0.4, 0.4))]
    once = [_row(kl, KV_1, shard=shard) for shard, kl in enumerate((0.1, 0.4))]
    block = Replacement(0, 1, KV_1, FULL_F)
    assert _scores(*twice).score(block, "decoupled").stderr == _scores(*once).score(block, "decoupled").stderr
    assert _scores(*twice[:2]).score(block, "decoupled").stderr is None


def test_all_scores_that_are_compared_are_means_over_the_same_shards() -> None:
    """No-ops have more shards than initial weights; over all of them they looked better than on the shared one."""
    rows = [_row(0.2, KV_1, weights="initial"), _row(0.3, NO_A, weights="initial")]
    rows += [_row(0.1, NO_A, shard=1, weights="initial"), _row(0.1, KV_1, shard=1), _row(0.1, KV_1)]
    rows += [_row(0.5, KV_1, shard=7, around="abc")]
    no_op, kv_1 = Replacement(0, 1, NO_A, FULL_F), Replacement(0, 1, KV_1, FULL_F)
    scores = _scores(*rows)
    assert scores.score(kv_1, "initial").mean == 0.2
    assert scores.score(no_op, "initial").mean == 0.3
    assert scores.total([no_op], "initial").stderr is None
    assert scores.score(no_op, "decoupled").mean == 0.2


def test_scores_without_a_common_shard_are_refused() -> None:
    scores = _scores(_row(0.2, KV_1), _row(0.3, ffn=NARROW, shard=1))
    with pytest.raises(InputError, match="decoupled scores have no calibration sequence in common"):
        scores.replacements("decoupled")


def test_errors_that_replacements_share_are_paired_by_shard() -> None:
    """Two blocks whose errors cancel shard by shard have a certain sum; two that move together double the error."""
    up, down = (0.1, 0.3), (0.3, 0.1)
    rows = [_row(up[shard], KV_1, block=0, shard=shard) for shard in (0, 1)]
    blocks = [Replacement(block, 1, KV_1, FULL_F) for block in (0, 1)]
    opposed = _scores(*rows, *(_row(down[shard], KV_1, block=1, shard=shard) for shard in (0, 1)))
    together = _scores(*rows, *(_row(up[shard], KV_1, block=1, shard=shard) for shard in (0, 1)))
    assert opposed.total(blocks, "decoupled").stderr == pytest.approx(0)
    single = together.score(blocks[0], "decoupled").stderr
    assert single is not None
    assert together.total(blocks, "decoupled").stderr == pytest.approx(2 * single)


def test_no_ops_have_no_weights_so_any_measurement_counts() -> None:
    scores = _scores(_row(0.5, NO_A, weights="initial"), _row(0.2, KV_1, weights="initial"))
    assert scores.score(Replacement(0, 1, NO_A, FULL_F), "decoupled").mean == 0.5
    with pytest.raises(InputError, match=r"kv_1 \+ ffn_64 has no decoupled score.*kv_1 \+ ffn_64 \(initial\)"):
        scores.score(Replacement(0, 1, KV_1, FULL_F), "decoupled")


def test_scores_around_another_architecture_do_not_count() -> None:
    scores = _scores(_row(0.5, KV_1, around="abc"))
    assert scores.replacements("decoupled") == ()


def test_replacements_are_all_that_the_rule_can_score() -> None:
    scores = _scores(
        _row(0.1, KV_1),
        _row(0.2, ffn=NARROW),
        _row(0.3, ffn=NO_F, weights="initial"),
        _row(0.4, NO_A, NO_F, weights="initial"),  # joint: neither half alone was measured for NO_A
        _row(0.9, KV_1, block=1, weights="initial"),  # another training
        _row(0.5, KV_1, span=2),  # a span without its full replacement: only what was measured
    )
    expected = {
        Replacement(0, 1, KV_1, FULL_F),
        Replacement(0, 1, FULL_A, NARROW),
        Replacement(0, 1, FULL_A, NO_F),
        Replacement(0, 1, KV_1, NARROW),
        Replacement(0, 1, KV_1, NO_F),
        Replacement(0, 1, NO_A, NO_F),
        Replacement(0, 2, KV_1, FULL_F),
    }
    scored = scores.replacements("decoupled")
    assert set(scored) == expected
    assert list(scored) == sorted(scored)


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 10)), min_size=2, max_size=6))
def test_the_total_is_the_sum_of_the_scores(shards: list[tuple[int, float]]) -> None:
    rows = [
        _row(kl * (block + 1), KV_1, block=block, shard=shard, tokens=tokens)
        for block in range(3)
        for shard, (tokens, kl) in enumerate(shards)
    ]
    scores = _scores(*rows)
    blocks = [Replacement(block, 1, KV_1, FULL_F) for block in range(3)]
    total = scores.total(blocks, "decoupled")
    assert total.mean == pytest.approx(sum(scores.score(block, "decoupled").mean for block in blocks))
    assert total.stderr is not None and total.stderr >= 0
