"""Baselines of the search against brute force on small problems, and what each of them is."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.search.baselines import depth, greedy, uniform, with_random_scores
from tasks.puzzle.search.best_child import best_child
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.mip import SolverSettings
from tasks.puzzle.search.problem import Choice, Limit, Problem

ATTENTIONS = (Attention("gqa", 2), Attention("gqa", 1), Attention("no_op"))
FFNS = (Ffn("gated", 96), Ffn("gated", 48), Ffn("gated", 24), Ffn("no_op"))
PARENT = tuple(Replacement(block, 1, ATTENTIONS[0], FFNS[0]) for block in range(4))
KV_TOTAL, WIDTH_TOTAL = 8, 4 * 96
PAIRS = list(itertools.product(ATTENTIONS[:2], FFNS[:2]))
Baseline = Callable[[Problem[Replacement], Sequence[Replacement]], tuple[Choice[Replacement], ...]]
BASELINES: tuple[Baseline, ...] = (uniform, greedy, depth)


def problem(kv: float, width: float, seed: int = 0) -> Problem[Replacement]:
    """Return 4 blocks, all pairs of variants; limits on kv heads and on FFN channels as shares of the parent's."""
    rng = random.Random(seed)
    replacements = []
    scores: dict[tuple[int, Attention | Ffn], float] = {}
    for block, attention, ffn in itertools.product(range(4), ATTENTIONS, FFNS):
        replacements.append(Replacement(block, 1, attention, ffn))
        for variant in (attention, ffn):
            is_parents = variant in (ATTENTIONS[0], FFNS[0])
            scores[block, variant] = 0.0 if is_parents else rng.uniform(0.01, 1)
    replacements.sort()
    choices = tuple(
        Choice(block, scores[block.first_block, block.attention] + scores[block.first_block, block.ffn])
        for block in replacements
    )
    heads = tuple(float(block.attention.num_kv_heads) for block in replacements)
    channels = tuple(float(block.ffn.intermediate_size) for block in replacements)
    limits = (
        Limit("kv", "kv", heads, constant=0.0, upper=kv * KV_TOTAL),
        Limit("width", "width", channels, constant=0.0, upper=width * WIDTH_TOTAL),
    )
    return Problem("t", 4, choices, limits)


def heads(chosen: tuple[Choice[Replacement], ...]) -> list[int]:
    return [choice.replacement.attention.num_kv_heads for choice in chosen]


def channels(chosen: tuple[Choice[Replacement], ...]) -> list[int]:
    return [choice.replacement.ffn.intermediate_size for choice in chosen]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_keeps_the_limits_and_is_no_better_than_the_search(baseline: Baseline, seed: int) -> None:
    limited = problem(0.7, 0.6, seed)
    chosen = baseline(limited, PARENT)
    assert [choice.replacement.first_block for choice in chosen] == [0, 1, 2, 3]
    assert sum(heads(chosen)) <= 0.7 * KV_TOTAL
    assert sum(channels(chosen)) <= 0.6 * WIDTH_TOTAL
    assert sum(choice.score for choice in chosen) >= best_child(limited, SolverSettings()).solution.objective - 1e-9


@pytest.mark.parametrize("baseline", BASELINES)
def test_limits_that_the_parent_keeps_change_nothing(baseline: Baseline) -> None:
    assert tuple(choice.replacement for choice in baseline(problem(1, 1), PARENT)) == PARENT


def test_uniform_takes_adjacent_widths() -> None:
    """The narrower one stands in evenly spaced blocks."""
    assert channels(uniform(problem(1, 0.4), PARENT)) == [48, 24, 48, 24]  # 153.6 channels
    assert channels(uniform(problem(1, 0.5), PARENT)) == [48] * 4


@pytest.mark.parametrize("seed", range(5))
def test_uniform_has_the_best_smaller_attention_in_the_best_blocks(seed: int) -> None:
    """Against all children with one smaller attention in any blocks, and one width in all."""
    limited = problem(kv=0.75, width=0.5, seed=seed)  # 6 of 8 heads
    scores = {choice.replacement: choice.score for choice in limited.choices}
    sums = []
    for attention, number in ((ATTENTIONS[1], 2), (ATTENTIONS[2], 1)):  # more blocks than needed only cost
        for smaller in itertools.combinations(range(4), number):
            blocks = [Replacement(i, 1, attention if i in smaller else ATTENTIONS[0], FFNS[1]) for i in range(4)]
            sums.append(sum(scores[block] for block in blocks))
    chosen = uniform(limited, PARENT)
    assert sum(choice.score for choice in chosen) == pytest.approx(min(sums))
    assert channels(chosen) == [48] * 4


def test_uniform_says_so_where_no_width_is_narrow_enough() -> None:
    with pytest.raises(InfeasibleError, match="baseline 'uniform' cannot keep all limits"):
        uniform(problem(1, 0.2), PARENT)  # 24 of 96 everywhere is 0.25
    assert len(greedy(problem(1, 0.2), PARENT)) == 4  # no-ops can


def test_uniform_leaves_a_block_whose_variants_are_not_allowed_as_it_is() -> None:
    chosen = uniform(_keeping(3, problem(1, 0.5)), PARENT)
    assert channels(chosen) == [24, 48, 24, 96]  # 192 channels


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_target_that_forbids_a_block_of_the_parent_has_no_baseline(baseline: Baseline) -> None:
    limited = problem(0.7, 0.6)
    without = [index for index, choice in enumerate(limited.choices) if choice.replacement != PARENT[2]]
    with pytest.raises(InfeasibleError, match="cannot keep all limits"):
        baseline(limited.restricted_to(without), PARENT)


def with_spans(limited: Problem[Replacement]) -> Problem[Replacement]:
    """Return the problem with spans over blocks 0 and 1, which cost nothing."""
    choices = (*limited.choices, *(Choice(Replacement(0, 2, *pair), 0.0) for pair in PAIRS))
    order = sorted(range(len(choices)), key=lambda index: choices[index].replacement)
    extended = (replace(limit, coefficients=limit.coefficients + (0.0,) * len(PAIRS)) for limit in limited.limits)
    limits = tuple(limit.restricted_to(order) for limit in extended)
    return replace(limited, choices=tuple(choices[index] for index in order), limits=limits)


@pytest.mark.parametrize("baseline", BASELINES)
def test_spans_are_left_to_the_search(baseline: Baseline) -> None:
    limited = problem(0.7, 0.6)
    assert baseline(with_spans(limited), PARENT) == baseline(limited, PARENT)


def test_random_scores_of_a_span_are_draws_of_its_own() -> None:
    """Its variants are never the parent's, though they have the same names."""
    drawn = with_random_scores(with_spans(problem(0.7, 0.6)), PARENT, 1)
    scores = {choice.replacement: choice.score for choice in drawn.choices}
    of_span, of_block = ({pair: scores[Replacement(0, span, *pair)] for pair in PAIRS} for span in (2, 1))
    assert all(score > 0 for score in of_span.values())
    assert not set(of_span.values()) & set(of_block.values())


def test_depth_removes_the_blocks_with_the_least_score() -> None:
    limited = problem(0.5, 0.5)
    no_ops = (ATTENTIONS[2], FFNS[3])
    removals = [c for c in limited.choices if (c.replacement.attention, c.replacement.ffn) == no_ops]
    removals.sort(key=lambda choice: choice.score)
    assert _removed(depth(limited, PARENT)) == {choice.replacement.first_block for choice in removals[:2]}


def test_depth_follows_the_order_of_joint_removals_then_the_scores() -> None:
    limited = problem(0.5, 0.5)
    assert _removed(depth(limited, PARENT, (3, 1))) == {1, 3}
    alone = _removed(depth(problem(0.75, 0.75), PARENT))
    last = max({0, 1, 2, 3} - alone)
    assert _removed(depth(limited, PARENT, (last,))) == alone | {last}
    assert _removed(depth(_keeping(3, limited), PARENT, (3, 2, 0))) == {0, 2}


def _removed(chosen: tuple[Choice[Replacement], ...]) -> set[int]:
    return {block for block, choice in enumerate(chosen) if choice.replacement != PARENT[block]}


def _keeping(block: int, limited: Problem[Replacement]) -> Problem[Replacement]:
    """Return the problem where a block must stay the parent's."""
    return limited.restricted_to(
        [
            index
            for index, choice in enumerate(limited.choices)
            if choice.replacement.first_block != block or choice.replacement == PARENT[block]
        ]
    )


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_cheapest_step_first(seed: int) -> None:
    """One limit, one step is enough: the least score per head saved."""
    limited = problem(7 / 8, 1, seed)
    steps = [choice for choice in limited.choices if choice.replacement.attention.num_kv_heads < 2]
    steps = [choice for choice in steps if choice.replacement.ffn == FFNS[0]]
    best = min(steps, key=lambda choice: choice.score)  # of a step of two heads counts the one that is missing
    assert [choice for choice in greedy(limited, PARENT) if choice.replacement not in PARENT] == [best]


def test_random_scores_are_additive_seeded_and_spare_the_parent() -> None:
    limited = problem(0.7, 0.6)
    drawn, same, other = (with_random_scores(limited, PARENT, seed) for seed in (1, 1, 2))
    assert drawn == same != other
    scores = {choice.replacement: choice.score for choice in drawn.choices}
    for choice in drawn.choices:
        block = choice.replacement.first_block
        halves = (
            Replacement(block, 1, choice.replacement.attention, FFNS[0]),
            Replacement(block, 1, ATTENTIONS[0], choice.replacement.ffn),
        )
        assert choice.score == pytest.approx(sum(scores[half] for half in halves))
    assert all(scores[block] == 0 for block in PARENT)
    assert len({round(score, 12) for score in scores.values()}) == 4 * 3 * 4 - 3
