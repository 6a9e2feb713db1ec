"""The whole search: operating points outside the solver, alternatives that differ, a frontier. No torch.

In: a Problem whose limits hold everywhere, and operating points (a batch and a tensor-parallel degree for each
scenario), each with limits of its own. Out: the best child over all points with a proof that no other point has a
better one: a point is solved only if its Lagrangian bound says that it could.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from tasks.puzzle.infeasible import infeasible
from tasks.puzzle.lagrangian import Relaxation
from tasks.puzzle.mip import Found, Settings, Solution, improve, solution
from tasks.puzzle.problem import Choice, Limit, P, Problem, check_cover


@dataclass(frozen=True)
class Point:
    """An operating point: its name for people, and the limits that hold there (the same names at every point)."""

    name: str
    limits: tuple[Limit, ...]

    def only(self, kept: Sequence[int]) -> "Point":
        """The point for a problem that has these choices (indices) alone."""
        return replace(self, limits=tuple(limit.only(kept) for limit in self.limits))


@dataclass(frozen=True)
class Tried:
    """How a point went: a proven bound of its children's scores, and the best one's score if it was solved."""

    point: str
    bound: float
    score: float | None


@dataclass(frozen=True)
class Best(Generic[P]):
    """The best child over all points; its `solution.bound` holds for all of them. `point` is its index."""

    solution: Solution[P]
    point: int
    tried: tuple[Tried, ...]


ANYWHERE = Point("", ())
"""The only point of a problem in which nothing is left to choose."""


def best_child(problem: Problem[P], settings: Settings, points: Sequence[Point] = (ANYWHERE,)) -> Best[P]:
    """The best child at the best point.

    Raises:
        InfeasibleError: no point has a child; the limits at fault are named.
        InputError: some block has no choice, the node limit was hit before a child was found, or the solver failed.
    """
    check_cover(problem)
    best = best_child_if_any(problem, settings, points)
    if best is None:
        raise infeasible([_at(problem, point) for point in points], settings)
    return best


def best_child_if_any(problem: Problem[P], settings: Settings, points: Sequence[Point] = (ANYWHERE,)) -> Best[P] | None:
    """As :func:`best_child`, None where no point has a child; why is not asked."""
    start = time.perf_counter()
    problems = [_at(problem, point) for point in points]
    found = _best_point(problems, settings)
    if found is None:
        return None
    cover, index, bounds, scores = found
    tried = tuple(Tried(point.name, bounds[number], scores.get(number)) for number, point in enumerate(points))
    return Best(solution(problems[index], cover, min(bounds), time.perf_counter() - start), index, tried)


def _at(problem: Problem[P], point: Point) -> Problem[P]:
    return replace(problem, limits=(*problem.limits, *point.limits))


def _best_point(
    problems: Sequence[Problem[Any]], settings: Settings
) -> tuple[Found, int, list[float], dict[int, float]] | None:
    """The best cover, its problem's index, a bound for every problem, and the scores of those that were solved."""
    relaxation = Relaxation(problems[0])
    relaxed = [relaxation.bounded(problem) for problem in problems]
    bounds, scores = [one.bound for one in relaxed], {}
    worth = min(one.objective for one in relaxed)
    best: tuple[Found, int] | None = None
    nodes = 0
    for index in sorted(range(len(problems)), key=lambda number: (bounds[number], number)):
        if best is not None and bounds[index] >= worth - settings.relative_gap * abs(worth):
            break
        better_than = worth if best is None else worth - settings.relative_gap * abs(worth)
        found = improve(problems[index], relaxed[index], better_than, settings)
        if found is None:  # nothing here is better than what another point has
            bounds[index] = max(bounds[index], better_than)
            continue
        nodes += found.nodes
        score = problems[index].score(found.chosen)
        bounds[index], scores[index] = max(bounds[index], min(found.bound, score)), score
        if best is None or score < worth:
            best, worth = (found, index), score
    if best is None:
        return None
    found, index = best
    return replace(found, nodes=nodes), index, bounds, scores


def alternatives(
    problem: Problem[P], settings: Settings, points: Sequence[Point], first: Best[P], count: int, min_distance: float
) -> Iterator[Best[P]]:
    """Further children in the order of their scores, each differing from all before it in a share of the blocks.

    Args:
        problem: as searched.
        settings: of the solver.
        points: as searched.
        first: the best child.
        count: how many more at most; fewer come where no child is different enough.
        min_distance: the least share of the parent's blocks that are replaced otherwise.
    """
    earlier = [first]
    most_alike = problem.num_blocks - math.ceil(min_distance * problem.num_blocks)
    while len(earlier) <= count:
        limits = tuple(_unlike(problem, best.solution.chosen, most_alike, n) for n, best in enumerate(earlier, start=1))
        best = best_child_if_any(replace(problem, limits=(*problem.limits, *limits)), settings, points)
        if best is None:
            return
        earlier.append(best)
        yield best


def _unlike(problem: Problem[P], chosen: Sequence[Choice[P]], most_alike: int, number: int) -> Limit:
    """At most so many of the parent's blocks are replaced as in an earlier child."""
    same = {choice.replacement for choice in chosen}
    return Limit(
        name=f"unlike {number}",
        text=f"differs from child {number}",
        coefficients=tuple(
            float(len(choice.replacement.parent_blocks)) if choice.replacement in same else 0.0
            for choice in problem.choices
        ),
        constant=0.0,
        upper=float(most_alike),
    )
