"""Operating points, alternatives and the frontier against brute force; Lagrangian bounds against every cover."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.records import Attention, Ffn, Replacement
from tasks.puzzle.frontier import sweep, undominated
from tasks.puzzle.infeasible import InfeasibleError
from tasks.puzzle.lagrangian import Relaxation
from tasks.puzzle.mip import Settings
from tasks.puzzle.problem import Choice, Limit, Problem
from tasks.puzzle.search import ANYWHERE, Best, Point, alternatives, best_child, best_child_if_any
from tests.puzzle.problems import Small, brute_force, covers, keeps, limits_of, problems


def at(problem: Small, point: Point) -> Small:
    return replace(problem, limits=(*problem.limits, *point.limits))


def cover_of(problem: Small, best: Best[Replacement]) -> tuple[int, ...]:
    return tuple(problem.choices.index(choice) for choice in best.solution.chosen)


@st.composite
def with_points(draw: st.DrawFn) -> tuple[Small, list[Point]]:
    """A problem with one limit everywhere, and 1 to 4 points with one of their own."""
    problem = draw(problems(num_limits=1))
    count = len(problem.choices)
    return problem, [Point(f"p{n}", (draw(limits_of(count, "own")),)) for n in range(draw(st.integers(1, 4)))]


@given(problems())
@settings(deadline=None, max_examples=150)
def test_a_bound_is_below_every_feasible_cover_that_holds_the_choice(problem: Small) -> None:
    bounded = Relaxation(problem).bounded(problem)
    feasible = [cover for cover in covers(problem) if keeps(problem, cover)]
    for cover in feasible:
        score = problem.score(cover)
        assert bounded.bound <= score + 1e-9
        assert all(bounded.through[index] <= score + 1e-9 for index in cover)
    if bounded.chosen is None:
        assert bounded.objective == math.inf
    else:
        assert bounded.chosen in feasible and bounded.objective == problem.score(bounded.chosen)


@given(with_points())
@settings(deadline=None, max_examples=100)
def test_the_best_point_is_the_best_of_all_points(case: tuple[Small, list[Point]]) -> None:
    problem, points = case
    scores = [score for point in points if (score := brute_force(at(problem, point))) is not None]
    found = best_child_if_any(problem, Settings(), points)
    if not scores:
        assert found is None
        with pytest.raises(InfeasibleError):
            best_child(problem, Settings(), points)
        return
    assert found is not None
    assert found.solution.objective == pytest.approx(min(scores), rel=1e-6, abs=1e-9)
    assert keeps(at(problem, points[found.point]), cover_of(problem, found))
    assert found.solution.bound <= min(scores) + 1e-9
    for tried, point in zip(found.tried, points, strict=True):
        own = brute_force(at(problem, point))
        assert own is None or min(tried.bound, found.solution.objective) <= own + 1e-6 * abs(own) + 1e-9


@given(with_points())
@settings(deadline=None, max_examples=100)
def test_infeasible_at_every_point_names_what_any_point_can_reach(case: tuple[Small, list[Point]]) -> None:
    problem, points = case
    points = [replace(point, limits=(replace(point.limits[0], upper=1 / 8),)) for point in points]
    if any(brute_force(at(problem, point)) is not None for point in points):
        return
    with pytest.raises(InfeasibleError) as caught:
        best_child(problem, Settings(), points)
    for conflict in caught.value.conflicts:
        reached = []
        for place in (at(problem, point) for point in points):
            limit = next(limit for limit in place.limits if limit.name == conflict.limit.name)
            kept = [cover for cover in covers(place) if keeps(place, cover, without=limit)]
            reached += [limit.total(cover) / limit.upper * limit.upper for cover in kept]
        assert (conflict.best is None) == (not reached)
    nearest = caught.value.nearest
    loosened = [
        replace(
            problem,
            limits=tuple(
                replace(limit, upper=max(limit.upper, nearest.get(limit.name, 0.0)))
                for limit in (*problem.limits, *point.limits)
            ),
        )
        for point in points
    ]
    assert any(brute_force(place) is not None for place in loosened)


@given(problems(num_limits=1), st.sampled_from([0.3, 0.5, 1.0]))
@settings(deadline=None, max_examples=60)
def test_alternatives_are_the_best_that_are_far_enough_from_all_before(problem: Small, distance: float) -> None:
    first = best_child_if_any(problem, Settings())
    if first is None:
        return
    found = [first, *alternatives(problem, Settings(), (ANYWHERE,), first, 3, distance)]
    earlier: list[tuple[int, ...]] = []
    for best in found:
        allowed = [
            cover
            for cover in covers(problem)
            if keeps(problem, cover) and all(_distance(problem, cover, one) >= distance for one in earlier)
        ]
        assert best.solution.objective == pytest.approx(min(map(problem.score, allowed)), rel=1e-6, abs=1e-9)
        assert cover_of(problem, best) in allowed
        earlier.append(cover_of(problem, best))
    if len(found) < 4:
        rest = [
            cover
            for cover in covers(problem)
            if keeps(problem, cover) and all(_distance(problem, cover, one) >= distance for one in earlier)
        ]
        assert not rest


def _distance(problem: Small, one: tuple[int, ...], other: tuple[int, ...]) -> float:
    same = sum(problem.choices[index].replacement.span for index in {*one} & {*other})
    return 1 - same / problem.num_blocks


@given(problems(num_limits=2))
@settings(deadline=None, max_examples=60)
def test_no_cover_beats_the_frontier(problem: Small) -> None:
    name = problem.limits[0].name
    feasible = [cover for cover in covers(problem) if keeps(problem, cover, without=problem.limits[0])]
    totals = sorted({problem.limits[0].total(cover) for cover in feasible})
    found = [point for point in sweep(problem, (ANYWHERE,), name, totals, Settings()) if point is not None]
    frontier = undominated(found)
    for one, other in itertools.pairwise(frontier):
        assert one.total < other.total and one.best.solution.objective > other.best.solution.objective
    for cover in feasible:
        total, score = problem.limits[0].total(cover), problem.score(cover)
        assert any(
            point.total <= total + 1e-9 and point.best.solution.objective <= score + 1e-6 * abs(score) + 1e-9
            for point in frontier
        )


def test_a_point_that_cannot_win_is_not_solved() -> None:
    """Its Lagrangian bound is above what the other point's child scores."""
    problem = _two_choices()
    loose, tight = (Point(name, (_limit(upper),)) for name, upper in (("loose", 3.0), ("tight", 0.0)))
    best = best_child(problem, Settings(), [tight, loose])
    assert best.point == 1 and best.solution.objective == 0.0
    assert best.tried[0].score is None and best.tried[0].bound == pytest.approx(3.0)


def test_what_leaves_no_cover_is_infeasible_and_not_searched_for_ever() -> None:
    """A choice whose neighbours no other choice covers."""
    nothing = Attention("no_op"), Ffn("no_op")
    places = ((0, 1), (0, 2), (2, 1))
    problem = Problem("t", 3, tuple(Choice(Replacement(*place, *nothing), 1.0) for place in places), ())
    assert best_child_if_any(problem, Settings()) is not None
    assert best_child_if_any(problem.only([0, 2]), Settings()) is None


def _two_choices() -> Small:
    choices = [
        Choice(Replacement(block, 1, Attention("gqa", heads), Ffn("no_op")), score)
        for block in range(3)
        for heads, score in ((1, 1.0), (2, 0.0))
    ]
    return Problem("t", 3, tuple(choices), ())


def _limit(upper: float) -> Limit:
    return Limit("own", "own", (0.0, 1.0) * 3, 0.0, upper)
