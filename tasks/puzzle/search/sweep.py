"""The frontier of quality against one limit: for many values of it the best child, each proven. No torch.

In: a Problem, the limits at its operating points, the name of one limit and the values that it takes. Out: a child for
each value, and those of them that no other beats.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic

from tasks.puzzle.search.best_child import BestChild, PointLimits, best_child_if_any
from tasks.puzzle.search.mip import SolverSettings
from tasks.puzzle.search.problem import Limit, P, Problem


@dataclass(frozen=True)
class FrontierPoint(Generic[P]):
    """A child on the way along one limit, `best`, with its sum of that limit, `total`."""

    total: float
    best: BestChild[P]


def sweep(
    problem: Problem[P],
    points: Sequence[PointLimits],
    name: str,
    uppers: Sequence[float],
    settings: SolverSettings,
) -> Iterator[FrontierPoint[P] | None]:
    """Yield the best child at each value of one limit; None where there is none.

    Args:
        problem: the choices, and the limits that hold everywhere.
        points: the limits at each operating point.
        name: the limit that is swept, one of the problem's or of the points'.
        uppers: values of its `upper`.
        settings: the solver's settings.
    """
    indices = {choice.replacement: index for index, choice in enumerate(problem.choices)}
    for upper in uppers:
        limited = replace(problem, limits=_with_upper(problem.limits, name, upper))
        limited_points = [replace(point, limits=_with_upper(point.limits, name, upper)) for point in points]
        best = best_child_if_any(limited, settings, limited_points)
        if best is None:
            yield None
            continue
        limits = (*limited.limits, *limited_points[best.point_index].limits)
        swept = next(limit for limit in limits if limit.name == name)
        yield FrontierPoint(swept.total(indices[choice.replacement] for choice in best.solution.chosen), best)


def _with_upper(limits: Sequence[Limit], name: str, upper: float) -> tuple[Limit, ...]:
    return tuple(replace(limit, upper=upper) if limit.name == name else limit for limit in limits)


def undominated(points: Sequence[FrontierPoint[P]]) -> list[FrontierPoint[P]]:
    """Keep the points that no other beats in score and total, by rising total; the first of equal ones."""
    kept: list[FrontierPoint[P]] = []
    for point in sorted(points, key=lambda point: (point.total, point.best.solution.objective)):
        if not kept or point.best.solution.objective < kept[-1].best.solution.objective:
            kept.append(point)
    return kept
