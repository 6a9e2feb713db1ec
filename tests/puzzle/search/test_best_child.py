"""Operating points, alternatives and the frontier against brute force; Lagrangian bounds against every cover."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.search.best_child import (
    ONE_POINT,
    BestChild,
    PointLimits,
    alternatives,
    best_child,
    best_child_if_any,
)
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.lagrangian import Relaxation
from tasks.puzzle.search.mip import SolverSettings
from tasks.puzzle.search.problem import Choice, Limit, Problem
from tasks.puzzle.search.sweep import sweep, undominated
from tests.puzzle.problems import Small, brute_force, covers, keeps, limits_of, problems


def at_point(problem: Small, point: PointLimits) -> Small:
    return replace(problem, limits=(*problem.limits, *point.limits))


def cover_of(problem: Small, best: BestChild[Replacement]) -> tuple[int, ...]:
    return tuple(problem.choices.index(choice) for choice in best.solution.chosen)


@st.composite
def with_points(draw: st.DrawFn) -> tuple[Small, list[PointLimits]]:
    """Return a problem with one limit everywhere, and 1 to 4 operating points with another limit each."""
    problem = draw(problems(num_limits=1))
    points = [
        PointLimits(f"p{number}", (draw(limits_of(len(problem.choices), "point's")),))
        for number in range(draw(st.integers(1, 4)))
    ]
    return problem, points


@given(problems())
@settings(deadline=None, max_examples=150)
def test_a_bound_is_below_every_feasible_cover_that_holds_the_choice(problem: Small) -> None:
    bounds = Relaxation(problem).bounds(problem)
    feasible = [cover for cover in covers(problem) if keeps(problem, cover)]
    for cover in feasible:
        score = problem.score(cover)
        assert bounds.bound <= score + 1e-9
        assert all(bounds.through[index] <= score + 1e-9 for index in cover)
    if bounds.chosen is None:
        assert bounds.objective == math.inf
    else:
        assert bounds.chosen in feasible and bounds.objective == problem.score(bounds.chosen)


@given(with_points())
@settings(deadline=None, max_examples=100)
def test_the_best_point_is_the_best_of_all_points(case: tuple[Small, list[PointLimits]]) -> None:
    problem, points = case
    scores = [score for point in points if (score := brute_force(at_point(problem, point))) is not None]
    best = best_child_if_any(problem, SolverSettings(), points)
    if not scores:
        assert best is None
        with pytest.raises(InfeasibleError):
            best_child(problem, SolverSettings(), points)
        return
    assert best is not None
    assert best.solution.objective == pytest.approx(min(scores), rel=1e-6, abs=1e-9)
    assert keeps(at_point(problem, points[best.point_index]), cover_of(problem, best))
    assert best.solution.bound <= min(scores) + 1e-9
    for tried, point in zip(best.tried, points, strict=True):
        optimum = brute_force(at_point(problem, point))
        proven = min(tried.bound, best.solution.objective)
        assert optimum is None or proven <= optimum + 1e-6 * abs(optimum) + 1e-9


@given(problems(num_limits=1), st.data())
@settings(deadline=None, max_examples=100)
def test_rules_hold_whether_the_solver_got_them_or_not(problem: Small, data: st.DataObject) -> None:
    rules = [
        replace(data.draw(limits_of(len(problem.choices), f"rule {number}")), is_rule=True)
        for number in range(data.draw(st.integers(1, 3)))
    ]
    ruled = replace(problem, rules=tuple(rules))
    best, optimum = best_child_if_any(ruled, SolverSettings()), brute_force(ruled.with_rules(rules))
    if best is not None and optimum is not None:
        assert best.solution.objective == pytest.approx(optimum, rel=1e-6, abs=1e-9)
        assert keeps(ruled.with_rules(rules), cover_of(ruled, best))
        assert [use.name for use in best.solution.uses] == ["limit 0"]
        return
    assert (best, optimum) == (None, None)
    with pytest.raises(InfeasibleError) as caught:
        best_child(ruled, SolverSettings())
    loosened = {conflict.limit.name for conflict in caught.value.conflicts} | set(caught.value.nearest)
    assert loosened <= {"limit 0"}
    is_possible_without = brute_force(problem) is not None
    assert all((rule.name in str(caught.value)) == is_possible_without for rule in rules)


@given(with_points())
@settings(deadline=None, max_examples=100)
def test_infeasible_at_every_point_names_what_any_point_can_reach(case: tuple[Small, list[PointLimits]]) -> None:
    problem, points = case
    points = [replace(point, limits=(replace(point.limits[0], upper=1 / 8),)) for point in points]
    if any(brute_force(at_point(problem, point)) is not None for point in points):
        return
    with pytest.raises(InfeasibleError) as caught:
        best_child(problem, SolverSettings(), points)
    for conflict in caught.value.conflicts:
        reachable = False
        for point in points:
            limited = at_point(problem, point)
            limit = next(limit for limit in limited.limits if limit.name == conflict.limit.name)
            reachable = reachable or any(keeps(limited, cover, without=limit) for cover in covers(limited))
        assert (conflict.best is not None) == reachable
    nearest = caught.value.nearest
    assert any(brute_force(_loosened(at_point(problem, point), nearest)) is not None for point in points)


def _loosened(problem: Small, uppers: dict[str, float]) -> Small:
    limits = tuple(replace(limit, upper=max(limit.upper, uppers.get(limit.name, 0.0))) for limit in problem.limits)
    return replace(problem, limits=limits)


@given(problems(num_limits=1), st.sampled_from([0.3, 0.5, 1.0]))
@settings(deadline=None, max_examples=60)
def test_alternatives_are_the_best_that_are_far_enough_from_all_before(problem: Small, distance: float) -> None:
    first = best_child_if_any(problem, SolverSettings())
    if first is None:
        return
    children = [first, *alternatives(problem, SolverSettings(), ONE_POINT, first, 3, distance)]
    earlier: list[tuple[int, ...]] = []
    for best in children:
        allowed = _far_enough(problem, earlier, distance)
        assert best.solution.objective == pytest.approx(min(map(problem.score, allowed)), rel=1e-6, abs=1e-9)
        assert cover_of(problem, best) in allowed
        earlier.append(cover_of(problem, best))
    if len(children) < 4:
        assert not _far_enough(problem, earlier, distance)


def _far_enough(problem: Small, earlier: list[tuple[int, ...]], distance: float) -> list[tuple[int, ...]]:
    """Return covers that keep all limits and differ from all earlier ones in at least this share of the blocks."""
    feasible = [cover for cover in covers(problem) if keeps(problem, cover)]
    return [cover for cover in feasible if all(_distance(problem, cover, other) >= distance for other in earlier)]


def _distance(problem: Small, cover: tuple[int, ...], other: tuple[int, ...]) -> float:
    same = sum(problem.choices[index].replacement.span for index in {*cover} & {*other})
    return 1 - same / problem.num_blocks


@given(problems(num_limits=2))
@settings(deadline=None, max_examples=60)
def test_no_cover_beats_the_frontier(problem: Small) -> None:
    name = problem.limits[0].name
    feasible = [cover for cover in covers(problem) if keeps(problem, cover, without=problem.limits[0])]
    totals = sorted({problem.limits[0].total(cover) for cover in feasible})
    points = [point for point in sweep(problem, ONE_POINT, name, totals, SolverSettings()) if point is not None]
    frontier = undominated(points)
    for point, following in itertools.pairwise(frontier):
        assert point.total < following.total
        assert point.best.solution.objective > following.best.solution.objective
    for cover in feasible:
        total, score = problem.limits[0].total(cover), problem.score(cover)
        assert any(
            point.total <= total + 1e-9 and point.best.solution.objective <= score + 1e-6 * abs(score) + 1e-9
            for point in frontier
        )


def test_a_point_that_cannot_win_is_not_solved() -> None:
    """Its Lagrangian bound is above what the other point's child scores."""
    problem = _two_choices()
    loose, tight = (PointLimits(name, (_limit(upper),)) for name, upper in (("loose", 3.0), ("tight", 0.0)))
    best = best_child(problem, SolverSettings(), [tight, loose])
    assert best.point_index == 1 and best.solution.objective == 0.0
    assert best.tried[0].score is None and best.tried[0].bound == pytest.approx(3.0)


def test_what_leaves_no_cover_is_infeasible_and_not_searched_for_ever() -> None:
    """A choice has neighbours that no other choice covers."""
    nothing = Attention("no_op"), Ffn("no_op")
    places = ((0, 1), (0, 2), (2, 1))
    problem = Problem("t", 3, tuple(Choice(Replacement(*place, *nothing), 1.0) for place in places), ())
    assert best_child_if_any(problem, SolverSettings()) is not None
    assert best_child_if_any(problem.restricted_to([0, 2]), SolverSettings()) is None


def _two_choices() -> Small:
    choices = [
        Choice(Replacement(block, 1, Attention("gqa", heads), Ffn("no_op")), score)
        for block in range(3)
        for heads, score in ((1, 1.0), (2, 0.0))
    ]
    return Problem("t", 3, tuple(choices), ())


def _limit(upper: float) -> Limit:
    return Limit("point's", "point's", (0.0, 1.0) * 3, 0.0, upper)
