"""The frontier of quality against one limit: for many values of it the best child, each proven. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic

from tasks.puzzle.mip import Settings
from tasks.puzzle.problem import Limit, P, Problem
from tasks.puzzle.search import Best, Point, best_child_if_any


@dataclass(frozen=True)
class FrontierPoint(Generic[P]):
    """A child that no other one beats in both: `total` is its sum of the swept limit, `best` it and its proof."""

    total: float
    best: Best[P]


def sweep(
    problem: Problem[P], points: Sequence[Point], name: str, uppers: Sequence[float], settings: Settings
) -> Iterator[FrontierPoint[P] | None]:
    """The best child at each value of one limit; None where there is none.

    Args:
        problem: with the limits that hold everywhere.
        points: operating points with theirs.
        name: of the limit that is swept, at whichever of the two places.
        uppers: values of its `upper`.
        settings: of the solver.
    """
    for upper in uppers:
        here = replace(problem, limits=_with_upper(problem.limits, name, upper))
        there = [replace(point, limits=_with_upper(point.limits, name, upper)) for point in points]
        best = best_child_if_any(here, settings, there)
        if best is None:
            yield None
            continue
        limit = next(limit for limit in (*here.limits, *there[best.point].limits) if limit.name == name)
        index = {choice.replacement: number for number, choice in enumerate(problem.choices)}
        yield FrontierPoint(limit.total(index[choice.replacement] for choice in best.solution.chosen), best)


def _with_upper(limits: Sequence[Limit], name: str, upper: float) -> tuple[Limit, ...]:
    return tuple(replace(limit, upper=upper) if limit.name == name else limit for limit in limits)


def undominated(found: Sequence[FrontierPoint[P]]) -> list[FrontierPoint[P]]:
    """Those that no other beats in score and total, by rising total; of equal ones the first."""
    kept: list[FrontierPoint[P]] = []
    for point in sorted(found, key=lambda one: (one.total, one.best.solution.objective)):
        if not kept or point.best.solution.objective < kept[-1].best.solution.objective:
            kept.append(point)
    return kept
