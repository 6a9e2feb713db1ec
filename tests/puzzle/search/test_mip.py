"""The search against brute force on small problems, against CBC at the demo's size, and its infeasible answers."""

import copy
import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ortools.math_opt.python import mathopt

from storage.files import InputError
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.search.best_child import best_child
from tasks.puzzle.search.infeasible import InfeasibleError, infeasible
from tasks.puzzle.search.mip import Solution, SolverSettings
from tasks.puzzle.search.mip_model import MipModel
from tasks.puzzle.search.problem import Choice, Limit, Problem
from tests.puzzle.problems import Small, brute_force, covers, keeps, problems


def solve(problem: Small, settings: SolverSettings) -> Solution[Replacement]:
    return best_child(problem, settings).solution


def optimum(value: float | None) -> object:
    """Return an object that equals `value` within `SolverSettings.relative_gap`, 1e-6."""
    return None if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)


def solved(problem: Small) -> float | None:
    """Return the search's objective, after checks of the solution that need no solver; None when infeasible."""
    try:
        solution = solve(problem, SolverSettings())
    except InfeasibleError:
        return None
    chosen = tuple(problem.choices.index(choice) for choice in solution.chosen)
    assert chosen in set(covers(problem)) and keeps(problem, chosen)
    assert solution.objective == pytest.approx(sum(choice.score for choice in solution.chosen))
    assert solution.bound <= solution.objective
    assert solution.status == "optimal" and solution.gap <= 1e-6
    return solution.objective


@given(problems())
@settings(deadline=None, max_examples=100)
def test_the_search_equals_brute_force(problem: Small) -> None:
    assert solved(problem) == optimum(brute_force(problem))


@pytest.mark.parametrize("unit", [2.0**-17, 2.0**-23, 2.0**-40, 2.0**40])
def test_the_unit_of_scores_and_costs_decides_nothing(unit: float) -> None:
    """HiGHS has absolute tolerances: of sums of 1e-7 a quarter came back "optimal", and up to 20 % off."""
    for seed in range(40):
        rng = random.Random(seed)
        replacements = [
            Replacement(block, 1, Attention("gqa", width), Ffn("no_op")) for block in range(4) for width in (1, 2, 3, 4)
        ]
        choices = tuple(Choice(replacement, unit * rng.random()) for replacement in replacements)
        costs = [tuple(rng.randrange(11) / unit for _ in choices) for _ in range(2)]
        limits = tuple(Limit(str(row), "", cost, 0.0, rng.randrange(12, 24) / unit) for row, cost in enumerate(costs))
        problem = Problem("t", 4, choices, limits)
        allowed = [
            sum(choices[index].score for index in cover)
            for cover in covers(problem)
            if all(limit.met_by(limit.total(cover)) for limit in limits)
        ]
        best = min(allowed, default=None)
        assert solved(problem) == (None if best is None else pytest.approx(best, rel=1e-6, abs=0)), seed


@given(problems(), st.integers(0, 20), st.integers(9, 30), st.booleans())
@settings(deadline=None, max_examples=100)
def test_a_huge_number_stands_for_never(problem: Small, position: int, power: int, is_score: bool) -> None:
    index = position % len(problem.choices)
    if is_score:
        choices = list(problem.choices)
        choices[index] = replace(choices[index], score=10.0**power)
        problem = replace(problem, choices=tuple(choices))
    else:
        coefficients = list(problem.limits[0].coefficients)
        coefficients[index] = 10.0**power
        first = replace(problem.limits[0], coefficients=tuple(coefficients))
        problem = replace(problem, limits=(first, *problem.limits[1:]))
    assert solved(problem) == optimum(brute_force(problem))


def test_what_the_solver_refuses_is_told_from_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    replacements = [
        Replacement(block, 1, Attention("gqa", width), Ffn("no_op")) for block in (0, 1) for width in (1, 2)
    ]
    choices = tuple(Choice(replacement, 1.0) for replacement in replacements)
    model = MipModel(Problem("t", 2, choices, (Limit("a", "a", (1.0, 1e20, 1.0, 2.0), 0.0, 3.0),)), [1.0] * 4)
    assert model.solve(mathopt.SolveParameters()) is None

    def ours(*_: Any, **__: Any) -> None:
        raise AttributeError("ours")

    monkeypatch.setattr(mathopt, "solve", ours)
    with pytest.raises(AttributeError, match="ours"):
        model.solve(mathopt.SolveParameters())


@given(problems(), st.integers(0, 1), st.integers(1, 80))
@settings(deadline=None, max_examples=40)
def test_loosening_a_limit_never_worsens_the_optimum(problem: Small, index: int, eighths: int) -> None:
    limits = list(problem.limits)
    limits[index] = replace(limits[index], upper=limits[index].upper + eighths / 8)
    before, after = solved(problem), solved(replace(problem, limits=tuple(limits)))
    if before is not None:
        assert after is not None and after <= before + 1e-6 * abs(before)


@given(problems(num_limits=3))
@settings(deadline=None, max_examples=100)
def test_infeasible_names_a_minimal_conflict_and_the_best_values(problem: Small) -> None:
    tight = replace(problem, limits=tuple(replace(limit, upper=limit.upper / 4) for limit in problem.limits))
    if any(True for cover in covers(tight) if keeps(tight, cover)):
        return
    with pytest.raises(InfeasibleError) as caught:
        solve(tight, SolverSettings())
    named = tuple(conflict.limit for conflict in caught.value.conflicts)
    alone = replace(tight, limits=named)
    assert not any(keeps(alone, cover) for cover in covers(tight))
    for conflict in caught.value.conflicts:
        assert any(keeps(alone, cover, without=conflict.limit) for cover in covers(tight))
        kept = [cover for cover in covers(tight) if keeps(tight, cover, without=conflict.limit)]
        best = min((conflict.limit.total(cover) for cover in kept), default=None)
        assert conflict.best == optimum(best)


def _demo(rng: random.Random, blocks: int, per_block: int) -> Small:
    """Make a problem with two binding knapsacks whose coefficients have all digits."""
    choices, costs = [], []
    for block, width in itertools.product(range(blocks), range(per_block)):
        kept = (per_block - width) / per_block
        choices.append(
            Choice(Replacement(block, 1, Attention("gqa", width + 1), Ffn("no_op")), rng.random() * (1 - kept))
        )
        costs.append((kept * rng.uniform(0.8, 1.2), kept * rng.uniform(0.8, 1.2)))
    limits = tuple(
        Limit(f"cost {i}", f"cost {i}", tuple(cost[i] * 1e9 for cost in costs), 0.0, 0.6e9 * blocks) for i in (0, 1)
    )
    return Problem("demo", blocks, tuple(choices), limits)


def _cbc(problem: Small) -> float:
    """Return the optimum by PuLP's CBC, which shares no code with HiGHS, with the relaxation or with our model."""
    model = pulp.LpProblem("search", pulp.LpMinimize)
    variables = [pulp.LpVariable(f"x{index}", cat="Binary") for index in range(len(problem.choices))]
    model += pulp.lpDot([choice.score for choice in problem.choices], variables)
    for block in range(problem.num_blocks):
        pairs = zip(problem.choices, variables, strict=True)
        model += pulp.lpSum(variable for choice, variable in pairs if block in choice.replacement.parent_blocks) == 1
    for limit in problem.limits:
        model += pulp.lpDot(limit.coefficients, variables) <= limit.upper - limit.constant
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=1e-7, threads=1, timeLimit=60))
    assert pulp.LpStatus[model.status] == "Optimal"
    return float(pulp.value(model.objective))


@pytest.mark.filterwarnings("ignore:.*PuLP 4.0:DeprecationWarning")
@pytest.mark.parametrize("seed", [0, 2])
def test_another_solver_agrees_at_the_size_of_the_demo(seed: int) -> None:
    problem = _demo(random.Random(seed), blocks=30, per_block=8)
    assert solve(problem, SolverSettings()).objective == pytest.approx(_cbc(problem), rel=2e-6)


def test_the_same_problem_gives_the_same_answer() -> None:
    problem = _demo(random.Random(1), blocks=30, per_block=8)
    first, second = (solve(problem, SolverSettings()) for _ in range(2))
    assert (first.chosen, first.bound, first.nodes) == (second.chosen, second.bound, second.nodes)


@pytest.mark.parametrize("never", [(2.0, 2.0), (1e20, 0.0), (0.0, 1e12)])
def test_a_limit_that_binds_has_its_price_and_one_that_does_not_has_none(never: tuple[float, float]) -> None:
    """One block mixed at cost 0 (score 1) or 1 (score 0): the relaxation trades 1 nat per unit of cost.

    A third choice, whose score or cost is `never`'s, has no part in it.
    """
    replacements = [Replacement(0, 1, Attention("gqa", heads), Ffn("no_op")) for heads in (1, 2, 3)]
    score, cost = never
    problem = Problem(
        "t",
        1,
        (Choice(replacements[0], 1.0), Choice(replacements[1], 0.0), Choice(replacements[2], score)),
        (Limit("tight", "tight", (0.0, 1.0, cost), 0.0, 0.5), Limit("loose", "loose", (0.0, 1.0, cost), 0.0, 8.0)),
    )
    tight, loose = solve(problem, SolverSettings()).uses
    assert tight.price == pytest.approx(0.5) and tight.binds  # 100 % of the limit is half a unit of cost
    assert loose.price == 0 and not loose.binds
    assert (tight.slack, loose.slack) == (1.0, 1.0)


def test_a_hit_node_limit_returns_the_incumbent_and_its_gap() -> None:
    problem = _demo(random.Random(3), blocks=40, per_block=20)
    best = solve(problem, SolverSettings())
    cut = solve(problem, SolverSettings(node_limit=1))
    assert cut.status == "node_limit"
    assert cut.bound < best.objective <= cut.objective
    assert cut.gap == pytest.approx((cut.objective - cut.bound) / cut.objective)
    assert all(limit.met_by(limit.total([problem.choices.index(c) for c in cut.chosen])) for limit in problem.limits)


def test_sums_that_a_solver_rounds_over_the_limit_are_not_accepted() -> None:
    """HiGHS accepts a limit exceeded by 1e-6 of it; that could be 100 bytes of 100 MB. The sum must be exact."""
    replacements = [Replacement(0, 1, Attention("gqa", heads), Ffn("no_op")) for heads in (1, 2, 3)]
    problem = Problem(
        "t",
        1,
        tuple(Choice(replacement, score) for replacement, score in zip(replacements, (0.0, 0.5, 1.0), strict=True)),
        (Limit("bytes", "bytes", (100_000_010.0, 100_000_001.0, 100_000_000.0), 0.0, 100_000_000.0),),
    )
    assert solve(problem, SolverSettings()).objective == 1.0


def test_the_message_speaks_the_users_units_and_gives_a_value_that_can_be_met() -> None:
    """Fastest: 700 ms where the parent takes 1000 ms: 1.428..x, of which 5 % are the margin: 1.360..x."""
    replacement = Replacement(0, 1, Attention("no_op"), Ffn("no_op"))
    limit = Limit(
        name="speed",
        text="speed: throughput >= 1.6x",
        coefficients=(600.0,),
        constant=100.0,
        upper=1000 / 1.6 / 1.05,
        scale=1000.0,
        inverse=True,
        unit="x",
        tightening=1.05,
    )
    with pytest.raises(
        InfeasibleError, match=r"no child of t .*\n  speed: throughput >= 1.6x: best reachable 1\.36x"
    ) as caught:
        solve(Problem("t", 1, (Choice(replacement, 0.1),), (limit,)), SolverSettings())
    assert InfeasibleError.exit_code == 3 and str(copy.copy(caught.value)) == str(caught.value)
    loosened = replace(limit, upper=1000 / 1.36 / 1.05)
    assert solve(Problem("t", 1, (Choice(replacement, 0.1),), (loosened,)), SolverSettings()).objective == 0.1


def _attentions(kept: tuple[float, ...], at_least: float, scale: float, unit: str) -> Small:
    """Make a problem of a choice per block and a lower limit: what is asked for is negative, like what a block adds."""
    choices = tuple(Choice(Replacement(block, 1, Attention("gqa", 1), Ffn("no_op")), 0.0) for block in range(len(kept)))
    coefficients = tuple(-count for count in kept)
    limit = Limit("heads", "heads >= ...", coefficients, 0.0, -at_least / scale, -scale, unit=unit)
    return Problem("t", len(kept), choices, (limit,))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_operating_points_the_one_that_keeps_more_is_the_best(order: tuple[int, int]) -> None:
    """One point reaches 1 block and the other 2, where 3 are asked for."""
    points = [_attentions(kept, 3.0, 1.0, " blocks") for kept in ((1.0, 0.0), (1.0, 1.0))]
    error = infeasible([points[index] for index in order], SolverSettings())
    assert "best reachable 2 blocks with the others kept" in str(error)
    assert error.nearest == {"heads": 2.0}


def test_a_lower_limit_is_shown_rounded_down() -> None:
    """20 of 30 blocks are 0.6667 of the parent's: 0.667 of them could not be met."""
    error = infeasible([_attentions((1.0,) * 20 + (0.0,) * 10, 0.9, 1 / 30, "x")], SolverSettings())
    assert "best reachable 0.666x" in str(error)


def test_a_block_without_a_choice_is_named() -> None:
    choices = tuple(Choice(Replacement(block, 1, Attention("no_op"), Ffn("no_op")), 0.0) for block in (0, 2))
    with pytest.raises(InputError, match="goes on from block 1"):
        solve(Problem("t", 3, choices, ()), SolverSettings())


def test_no_limits_choose_the_lowest_scores() -> None:
    problem = _demo(random.Random(3), blocks=5, per_block=4)
    lowest = math.fsum(
        min(choice.score for choice in problem.choices if choice.replacement.first_block == block) for block in range(5)
    )
    assert solve(replace(problem, limits=()), SolverSettings()).objective == pytest.approx(lowest)
