"""Why no child exists: which limits exclude each other, how far each can be met, and the nearest limits that can be.

In: the problem, once for every operating point that the search may choose (the same limits by name, with other
coefficients). Out: an InfeasibleError. No torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from storage.files import InputError
from tasks.puzzle.mip import Found, Settings, minimise, minimise_excess
from tasks.puzzle.problem import TOLERANCE, Limit, Problem

Problems = Sequence[Problem[Any]]


@dataclass(frozen=True)
class Conflict:
    """A limit that cannot be met together with others, and the best limit that could be set with them kept.

    `best` is in the user's unit, the safety margin allowed for. It is None where the others exclude each other
    even without this one.
    """

    limit: Limit
    best: float | None

    @property
    def text(self) -> str:
        """For the message; the value is rounded so that it can be met as printed."""
        if self.best is None:
            return f"{self.limit.text}: the other limits cannot be met together either"
        return f"{self.limit.text}: best reachable {_shown(self.limit, self.best)} with the others kept"


class InfeasibleError(InputError):
    """No child meets all limits.

    `conflicts` cannot be met together; without any one of them the others can. `nearest`: values of limits by name, in
    the user's unit, which together can be met; of all such it loosens by the least, summed over shares of each limit.
    """

    exit_code = 3

    def __init__(
        self, message: str, conflicts: tuple[Conflict, ...] = (), nearest: dict[str, float] | None = None
    ) -> None:
        """Keep the findings beside the message (the only argument without a default: runners copy the error)."""
        super().__init__(message)
        self.conflicts = conflicts
        self.nearest = nearest or {}


def infeasible(problems: Problems, settings: Settings) -> InfeasibleError:
    """The reasons why none of the problems has a solution."""
    conflicts = _conflicts(problems, settings)
    nearest = _nearest(problems, settings)
    name = problems[0].name
    which = "this limit cannot be met" if len(conflicts) == 1 else "these limits cannot be met together"
    lines = "".join(f"\n  {conflict.text}" for conflict in conflicts)
    if nearest and len(conflicts) > 1:
        limits = {limit.name: limit for limit in problems[0].limits}
        together = ", ".join(f"{key} {_shown(limits[key], value)}" for key, value in nearest.items())
        lines += f"\n  the nearest limits that can be met together: {together}"
    message = f"no child of {name} exists: {which}; loosen one ({problems[0].where}):{lines}"
    return InfeasibleError(message, conflicts, nearest)


def _conflicts(problems: Problems, settings: Settings) -> tuple[Conflict, ...]:
    """Limits that exclude each other (a minimal set, by leaving out one at a time), each with its best value."""
    limits = problems[0].limits
    kept = [limit.name for limit in limits]
    for limit in limits:
        fewer = [name for name in kept if name != limit.name]
        if not any(_feasible(_with(problem, fewer), settings) for problem in problems):
            kept = fewer
    return tuple(Conflict(limit, _best(problems, limit.name, settings)) for limit in limits if limit.name in kept)


def _feasible(problem: Problem[Any], settings: Settings) -> bool:
    found, hit = minimise(problem, [0.0] * len(problem.choices), settings)
    return found is not None or hit


def _with(problem: Problem[Any], names: Iterable[str]) -> Problem[Any]:
    return replace(problem, limits=tuple(limit for limit in problem.limits if limit.name in set(names)))


def _best(problems: Problems, name: str, settings: Settings) -> float | None:
    """The best limit that could be set here with all others kept; None when they cannot be kept."""
    values = []
    for problem in problems:
        limit = next(limit for limit in problem.limits if limit.name == name)
        others = replace(problem, limits=tuple(other for other in problem.limits if other is not limit))
        found, _ = minimise(others, limit.coefficients, settings)
        if found is not None:
            values.append((limit.total(found.chosen) / limit.upper, _settable(limit, found)))
    return min(values)[1] if values else None


def _settable(limit: Limit, found: Found) -> float:
    """The user's limit that a solution just keeps, margin included."""
    return limit.in_user_units(limit.total(found.chosen)) / limit.tightening


def _nearest(problems: Problems, settings: Settings) -> dict[str, float]:
    """By name, the limits to be loosened and to what, in the user's unit."""
    candidates = []
    for number, problem in enumerate(problems):
        if (found := minimise_excess(problem, settings)) is not None:
            exceeded = [limit for limit in problem.limits if not limit.met_by(limit.total(found.chosen))]
            excess = math.fsum(limit.total(found.chosen) / limit.upper - 1 for limit in exceeded)
            candidates.append((excess, number, {limit.name: _settable(limit, found) for limit in exceeded}))
    return min(candidates)[2] if candidates else {}


def _shown(limit: Limit, value: float) -> str:
    """Three significant digits with the unit, rounded towards the side that can be met."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}{limit.unit}"
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    up = not limit.inverse
    steps = math.ceil(value / step - TOLERANCE) if up else math.floor(value / step + TOLERANCE)
    return f"{steps * step:.10g}{limit.unit}"
