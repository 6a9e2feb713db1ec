"""The best child over all operating points, and alternatives that differ from it. No torch.

In: a Problem whose limits hold everywhere, and the limits that hold at each operating point (a batch and a
tensor-parallel degree for each scenario). Out: the best child over all points with a proof that no other point has a
better one: a point is solved only if its Lagrangian bound says that it could.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from tasks.puzzle.search.infeasible import infeasible
from tasks.puzzle.search.lagrangian import Relaxation
from tasks.puzzle.search.mip import ProvenCover, Solution, SolverSettings, best_cover_within, solution
from tasks.puzzle.search.problem import Choice, Limit, P, Problem, check_cover


@dataclass(frozen=True)
class PointLimits:
    """The limits that hold at one operating point (the same names at every point), and the point's name for people."""

    name: str
    limits: tuple[Limit, ...]

    def restricted_to(self, indices: Sequence[int]) -> "PointLimits":
        """Return the limits for a problem that has these choices (indices) alone."""
        return replace(self, limits=tuple(limit.restricted_to(indices) for limit in self.limits))


@dataclass(frozen=True)
class TriedPoint:
    """The outcome at an operating point: a proven bound of its children's scores, and its best score if it was solved.

    `point` is the point's name.
    """

    point: str
    bound: float
    score: float | None


@dataclass(frozen=True)
class BestChild(Generic[P]):
    """The best child over all operating points, and the index of the point where it is best.

    `solution.bound` holds for all points.
    """

    solution: Solution[P]
    point_index: int
    tried: tuple[TriedPoint, ...]


ONE_POINT = (PointLimits("", ()),)
"""The operating points of a problem that leaves none open: one, which adds no limits."""


def best_child(
    problem: Problem[P], settings: SolverSettings, points: Sequence[PointLimits] = ONE_POINT
) -> BestChild[P]:
    """Find the best child at the best operating point.

    Raises:
        InfeasibleError: no point has a child; the limits at fault are named.
        InputError: some block has no choice, the node limit was hit before a child was found, or the solver failed.
    """
    check_cover(problem)
    best = best_child_if_any(problem, settings, points)
    if best is None:
        whole = problem.with_rules(problem.rules)
        raise infeasible([_at_point(whole, point) for point in points], settings)
    return best


def best_child_if_any(
    problem: Problem[P], settings: SolverSettings, points: Sequence[PointLimits] = ONE_POINT
) -> BestChild[P] | None:
    """Find the best child, or None where no point has one; reasons are not searched for."""
    start = time.perf_counter()
    while True:
        problems = [_at_point(problem, point) for point in points]
        outcome = _best_point(problems, settings)
        if outcome is None:
            return None
        broken = [rule for rule in problem.rules if not rule.met_by(rule.total(outcome.cover.chosen))]
        if not broken:
            break
        problem = problem.with_rules(broken)
    tried = tuple(
        TriedPoint(point.name, outcome.bounds[index], outcome.scores.get(index)) for index, point in enumerate(points)
    )
    best_problem = problems[outcome.point_index]
    best_solution = solution(best_problem, outcome.cover, min(outcome.bounds), time.perf_counter() - start)
    return BestChild(best_solution, outcome.point_index, tried)


def _at_point(problem: Problem[P], point: PointLimits) -> Problem[P]:
    return replace(problem, limits=(*problem.limits, *point.limits))


@dataclass(frozen=True)
class _Outcome:
    """The best cover and its point's index, a bound for every point, and the score of every point that was solved."""

    cover: ProvenCover
    point_index: int
    bounds: list[float]
    scores: dict[int, float]


def _best_point(problems: Sequence[Problem[Any]], settings: SolverSettings) -> _Outcome | None:
    """Solve the problems of all points in the order of their bounds, until no other can win; None if none has a cover.

    The cover's `nodes` count those of all points.
    """
    relaxation = Relaxation(problems[0])
    relaxed = [relaxation.bounds(problem) for problem in problems]
    bounds = [point_bounds.bound for point_bounds in relaxed]
    scores: dict[int, float] = {}
    incumbent = min(point_bounds.objective for point_bounds in relaxed)
    best: tuple[ProvenCover, int] | None = None
    nodes = 0
    for index in sorted(range(len(problems)), key=lambda index: (bounds[index], index)):
        if best is not None and bounds[index] >= incumbent - settings.relative_gap * abs(incumbent):
            break
        better_than = incumbent if best is None else incumbent - settings.relative_gap * abs(incumbent)
        cover = best_cover_within(problems[index], relaxed[index], better_than, settings)
        if cover is None:  # no cover of this point is better than what another point has
            bounds[index] = max(bounds[index], better_than)
            continue
        nodes += cover.nodes
        score = problems[index].score(cover.chosen)
        bounds[index], scores[index] = max(bounds[index], min(cover.bound, score)), score
        if best is None or score < incumbent:
            best, incumbent = (cover, index), score
    if best is None:
        return None
    cover, index = best
    return _Outcome(replace(cover, nodes=nodes), index, bounds, scores)


def alternatives(
    problem: Problem[P],
    settings: SolverSettings,
    points: Sequence[PointLimits],
    first: BestChild[P],
    count: int,
    min_distance: float,
) -> Iterator[BestChild[P]]:
    """Find further children in the order of their scores, each differing from all before it in a share of the blocks.

    Args:
        problem: the problem that `first` solves.
        settings: the solver's settings.
        points: the operating points that `first` was searched over.
        first: the best child.
        count: the largest number of alternatives; fewer come where no child is different enough.
        min_distance: the least share of the parent's blocks whose replacements differ.
    """
    earlier = [first]
    most_alike = problem.num_blocks - math.ceil(min_distance * problem.num_blocks)
    while len(earlier) <= count:
        limits = [
            _unlike(problem, child.solution.chosen, most_alike, number) for number, child in enumerate(earlier, start=1)
        ]
        best = best_child_if_any(replace(problem, limits=(*problem.limits, *limits)), settings, points)
        if best is None:
            return
        earlier.append(best)
        yield best


def _unlike(problem: Problem[P], chosen: Sequence[Choice[P]], most_alike: int, number: int) -> Limit:
    """Return the limit that at most `most_alike` of the parent's blocks are replaced as in an earlier child."""
    same = {choice.replacement for choice in chosen}
    blocks_alike = (
        float(len(choice.replacement.parent_blocks)) if choice.replacement in same else 0.0
        for choice in problem.choices
    )
    return Limit(
        name=f"unlike {number}",
        text=f"differs from child {number}",
        coefficients=tuple(blocks_alike),
        constant=0.0,
        upper=float(most_alike),
    )
