"""Why no child exists: which limits exclude each other, how far each can be met, and the nearest limits that are met.

In: the problem, once for every operating point that the search may choose (the same limits by name, with other
coefficients). Out: an InfeasibleError that names them. No torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from storage.files import InputError
from tasks.puzzle.search.mip import ProvenCover, SolverSettings, minimise, minimise_excess
from tasks.puzzle.search.problem import TOLERANCE, Limit, Problem

Problems = Sequence[Problem[Any]]


@dataclass(frozen=True)
class Conflict:
    """A limit that cannot be met together with others, and the best limit that could be set with them kept.

    `best` is in the user's unit, with its safety margin taken off. It is None where the others exclude each other even
    without this one.
    """

    limit: Limit
    best: float | None

    @property
    def text(self) -> str:
        """Return the conflict as a line of the message; the value is rounded so that it can be met as printed."""
        if self.best is None:
            return f"{self.limit.text}: the other limits cannot be met together either"
        return f"{self.limit.text}: best reachable {_shown(self.limit, self.best)} with the others kept"


class InfeasibleError(InputError):
    """No child meets all limits.

    `conflicts` cannot be met together; without any one of them the others can. `nearest` holds values of limits by
    name, in the user's unit, that can be met together; of all such it loosens the limits by the least sum of shares.
    """

    exit_code = 3

    def __init__(
        self, message: str, conflicts: tuple[Conflict, ...] = (), nearest: dict[str, float] | None = None
    ) -> None:
        """Keep the conflicts beside the message (the only argument without a default: runners copy the error)."""
        super().__init__(message)
        self.conflicts = conflicts
        self.nearest = nearest or {}


def infeasible(problems: Problems, settings: SolverSettings) -> InfeasibleError:
    """Return the error that says why none of the problems has a solution."""
    conflicts = _conflicts(problems, settings)
    nearest = _nearest(problems, settings)
    name = problems[0].name
    rules = _rules_at_fault(problems, settings)
    reason = "this limit cannot be met" if len(conflicts) == 1 else "these limits cannot be met together"
    lines = "".join(f"\n  {line}" for line in (*(conflict.text for conflict in conflicts), *rules))
    if nearest and len(conflicts) > 1:
        limits = {limit.name: limit for limit in problems[0].limits}
        together = ", ".join(f"{key} {_shown(limits[key], value)}" for key, value in nearest.items())
        lines += f"\n  the nearest limits that can be met together: {together}"
    message = f"no child of {name} exists: {reason}; loosen one ({problems[0].where}):{lines}"
    return InfeasibleError(message, conflicts, nearest)


def _conflicts(problems: Problems, settings: SolverSettings) -> tuple[Conflict, ...]:
    """Find a minimal set of limits that exclude each other, by leaving out one at a time; each with its best value.

    The rules are kept throughout.
    """
    limits = [limit for limit in problems[0].limits if not limit.is_rule]
    names = [limit.name for limit in problems[0].limits]
    for limit in limits:
        fewer = [name for name in names if name != limit.name]
        if not any(_feasible(_with_limits(problem, fewer), settings) for problem in problems):
            names = fewer
    return tuple(Conflict(limit, _best(problems, limit.name, settings)) for limit in limits if limit.name in names)


def _rules_at_fault(problems: Problems, settings: SolverSettings) -> list[str]:
    """Return the rules in words, where a child would exist without them."""
    rules = list(dict.fromkeys(limit.text for limit in problems[0].limits if limit.is_rule))
    names = [limit.name for limit in problems[0].limits if not limit.is_rule]
    is_possible = rules and any(_feasible(_with_limits(problem, names), settings) for problem in problems)
    return rules if is_possible else []


def _feasible(problem: Problem[Any], settings: SolverSettings) -> bool:
    """Tell whether a cover exists, or may exist where the node limit was hit first."""
    cover, limit_hit = minimise(problem, [0.0] * len(problem.choices), settings)
    return cover is not None or limit_hit


def _with_limits(problem: Problem[Any], names: Iterable[str]) -> Problem[Any]:
    return replace(problem, limits=tuple(limit for limit in problem.limits if limit.name in set(names)))


def _best(problems: Problems, name: str, settings: SolverSettings) -> float | None:
    """Find the best value that this limit could be set to with all others kept; None when they cannot be kept."""
    values = []
    for problem in problems:
        limit = next(limit for limit in problem.limits if limit.name == name)
        without_limit = replace(problem, limits=tuple(other for other in problem.limits if other is not limit))
        cover, _ = minimise(without_limit, limit.coefficients, settings)
        if cover is not None:
            values.append((_excess(limit, cover), _settable(limit, cover)))
    return min(values)[1] if values else None


def _excess(limit: Limit, cover: ProvenCover) -> float:
    """Return the share of a limit by which a cover exceeds it, negative below; a lower limit's `upper` is negative."""
    return (limit.total(cover.chosen) - limit.upper) / abs(limit.upper)


def _settable(limit: Limit, cover: ProvenCover) -> float:
    """Return the user's limit that a cover just keeps, margin included."""
    return limit.in_user_units(limit.total(cover.chosen)) / limit.tightening


def _nearest(problems: Problems, settings: SolverSettings) -> dict[str, float]:
    """Return the limits to be loosened, by name, and their values in the user's unit."""
    candidates = []
    for index, problem in enumerate(problems):
        cover = minimise_excess(problem, settings)
        if cover is None:
            continue
        loose = [limit for limit in problem.limits if not limit.is_rule]
        exceeded = [limit for limit in loose if not limit.met_by(limit.total(cover.chosen))]
        excess = math.fsum(_excess(limit, cover) for limit in exceeded)
        candidates.append((excess, index, {limit.name: _settable(limit, cover) for limit in exceeded}))
    return min(candidates)[2] if candidates else {}


def _shown(limit: Limit, value: float) -> str:
    """Return the value with three significant digits and its unit, rounded towards the side that can be met."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}{limit.unit}"
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    is_lower = limit.inverse or limit.scale < 0
    steps = math.floor(value / step + TOLERANCE) if is_lower else math.ceil(value / step - TOLERANCE)
    return f"{steps * step:.10g}{limit.unit}"
