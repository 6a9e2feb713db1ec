"""The solver: the replacements with the smallest sum of scores that cover the parent and keep every limit. No torch.

In: a Problem and its relaxation, which leaves out most choices; what remains goes to a MIP solver through ortools
MathOpt. Out: a cover with a proven bound, None where there is none; a Solution says what it uses of each limit. Limits
of the solver are deterministic (nodes, gap, never seconds), one thread, a seed: the same problem gives the same answer.
"""

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal

from ortools.math_opt.python import mathopt

from storage.files import InputError
from tasks.puzzle.lagrangian import Bounded
from tasks.puzzle.problem import TOLERANCE, Choice, Limit, P, Problem

Solver = Literal["highs", "scip", "cp-sat"]
Status = Literal["optimal", "node_limit"]

_SOLVERS = {
    "highs": mathopt.SolverType.HIGHS,
    "scip": mathopt.SolverType.GSCIP,
    "cp-sat": mathopt.SolverType.CP_SAT,
}
_MAX_REPAIRS = 1_000
_NO_SOLUTION = (
    mathopt.TerminationReason.INFEASIBLE,
    mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED,  # every variable is bounded
)


@dataclass(frozen=True)
class Settings:
    """How to solve. `node_limit` counts branch-and-bound nodes (CP-SAT has none: conflicts instead)."""

    solver: Solver = "highs"
    relative_gap: float = 1e-6
    node_limit: int = 1_000_000
    seed: int = 0


@dataclass(frozen=True)
class LimitUse:
    """How a solution uses a limit: what was allowed (its safety margin taken off) and reached, in the user's unit.

    `slack` is the unused share of the upper limit. `price` is the dual of the LP relaxation at this limit: nats/token
    that the score would fall if the limit were loosened by 100 %, at the present rate. A limit with a price binds.
    """

    name: str
    allowed: float
    reached: float
    slack: float
    price: float

    @property
    def binds(self) -> bool:
        """Whether loosening the limit a little would improve the relaxed optimum."""
        return self.price > TOLERANCE


@dataclass(frozen=True)
class Solution(Generic[P]):
    """The chosen replacements in order, with the proof: `bound` <= any feasible sum of scores, nats/token.

    `gap` = (objective - bound) / |objective|. `status` is "optimal" (gap within the settings') or "node_limit" (the
    best found when the limit was hit).
    """

    chosen: tuple[Choice[P], ...]
    objective: float
    bound: float
    status: Status
    nodes: int
    seconds: float
    uses: tuple[LimitUse, ...]

    @property
    def gap(self) -> float:
        """Of the proof."""
        return (self.objective - self.bound) / abs(self.objective) if self.objective else 0.0


@dataclass(frozen=True)
class Found:
    """A feasible choice of indices, checked exactly, with a proven bound of the problem."""

    chosen: tuple[int, ...]
    bound: float
    nodes: int
    limit_hit: bool


def solution(problem: Problem[P], found: Found, bound: float, seconds: float) -> Solution[P]:
    """What was found, with what it uses of each limit."""
    objective = problem.score(found.chosen)
    prices = _prices(problem)
    return Solution(
        chosen=tuple(problem.choices[index] for index in found.chosen),
        objective=objective,
        bound=min(bound, objective),
        status="node_limit" if found.limit_hit else "optimal",
        nodes=found.nodes,
        seconds=seconds,
        uses=tuple(_use(limit, found.chosen, prices[limit.name]) for limit in problem.limits),
    )


def _use(limit: Limit, chosen: Sequence[int], price: float) -> LimitUse:
    total = limit.total(chosen)
    return LimitUse(
        name=limit.name,
        allowed=limit.in_user_units(limit.upper),
        reached=limit.in_user_units(total),
        slack=(limit.upper - total) / abs(limit.upper) if limit.upper else 0.0,
        price=price,
    )


def improve(problem: Problem[Any], bounded: Bounded, worth: float, settings: Settings) -> Found | None:
    """The best cover with a score of at most `worth`, given the problem's relaxation; None where there is none.

    Choices that no such cover can hold are left out before a solver sees the problem.
    """
    worth = min(worth, bounded.objective)
    if bounded.bound == math.inf or bounded.bound > worth + TOLERANCE * abs(worth):
        return None
    if bounded.chosen is not None and bounded.objective <= worth and _closes(bounded, settings):
        return Found(bounded.chosen, bounded.bound, 0, limit_hit=False)
    kept = [index for index, least in enumerate(bounded.through) if least <= worth + TOLERANCE * abs(worth)]
    reduced = problem.only(kept)
    found, hit = minimise(reduced, [choice.score for choice in reduced.choices], settings)
    if found is not None:
        return replace(found, chosen=tuple(kept[index] for index in found.chosen))
    if hit and bounded.chosen is not None and bounded.objective <= worth:
        return Found(bounded.chosen, bounded.bound, settings.node_limit, limit_hit=True)
    if hit:
        raise InputError(
            f"{problem.name}: {settings.solver} found no child within {settings.node_limit} nodes, nor that there is "
            "none; raise search_architecture.node_limit"
        )
    return None


def _closes(bounded: Bounded, settings: Settings) -> bool:
    return bounded.objective - bounded.bound <= settings.relative_gap * abs(bounded.objective)


def minimise(problem: Problem[Any], objective: Sequence[float], settings: Settings) -> tuple[Found | None, bool]:
    """Minimise the sum of `objective` over covers that keep the limits.

    Solvers work within a tolerance. A solution that exceeds a limit in the exact sum is excluded (by a cut that
    removes it alone) and the problem solved again, so what comes back keeps every limit and the bound stays valid.

    Returns:
        The best cover, None when there is none or none was found; and whether the node limit was hit.

    Raises:
        InputError: the solver failed.
    """
    model = _Model(problem, objective)
    nodes = 0
    for _ in range(_MAX_REPAIRS):
        result = model.solve(settings)
        nodes += result.solve_stats.node_count
        reason = result.termination.reason
        if reason in _NO_SOLUTION:
            return None, False
        if not result.has_primal_feasible_solution():
            if reason == mathopt.TerminationReason.NO_SOLUTION_FOUND:
                return None, True
            raise InputError(
                f"{problem.name}: {settings.solver} ended with {reason.name} ({result.termination.detail}); try "
                f"another search_architecture.solver ({', '.join(_SOLVERS)})"
            )
        chosen = model.chosen(result)
        covered = [block for index in chosen for block in problem.choices[index].replacement.parent_blocks]
        assert sorted(covered) == list(range(problem.num_blocks)), chosen
        if problem.kept_by(chosen):
            hit = reason == mathopt.TerminationReason.FEASIBLE
            return Found(chosen, result.termination.objective_bounds.dual_bound, nodes, hit), hit
        model.exclude(chosen)
    raise InputError(
        f"{problem.name}: {settings.solver} returned {_MAX_REPAIRS} solutions that exceed a limit by rounding; "
        "move the limit a little"
    )


def minimise_excess(problem: Problem[Any], settings: Settings) -> Found | None:
    """The cover that exceeds the limits by least, summed over shares of each limit; None if no cover was found."""
    model = _Model(problem, [0.0] * len(problem.choices), soft=True)
    result = model.solve(settings)
    if not result.has_primal_feasible_solution():
        return None
    hit = result.termination.reason == mathopt.TerminationReason.FEASIBLE
    return Found(model.chosen(result), result.termination.objective_bounds.dual_bound, 0, hit)


class _Model:
    """A MathOpt model of a problem. Rows are scaled by powers of two, which changes no digit of the coefficients.

    With `soft` limits, the share by which each is exceeded is added to the objective.
    """

    def __init__(
        self, problem: Problem[Any], objective: Sequence[float], integer: bool = True, soft: bool = False
    ) -> None:
        self._model = mathopt.Model(name=problem.name)
        self._variables = [
            self._model.add_variable(lb=0.0, ub=1.0, is_integer=integer, name=str(index))
            for index in range(len(problem.choices))
        ]
        covering = defaultdict(list)
        for variable, choice in zip(self._variables, problem.choices, strict=True):
            for block in choice.replacement.parent_blocks:
                covering[block].append(variable)
        for block in range(problem.num_blocks):
            self._model.add_linear_constraint(mathopt.fast_sum(covering[block]) == 1.0)
        self._excesses = [self._model.add_variable(lb=0.0) for _ in problem.limits] if soft else []
        allowances = self._excesses or [0.0] * len(problem.limits)
        pairs = zip(problem.limits, allowances, strict=True)
        self.rows = {limit.name: self._add_limit(limit, allowance) for limit, allowance in pairs}
        self._model.minimize(self._weighted(objective) + mathopt.fast_sum(self._excesses))

    def _weighted(self, coefficients: Sequence[float]) -> mathopt.LinearSum:
        pairs = zip(coefficients, self._variables, strict=True)
        return mathopt.fast_sum(coefficient * variable for coefficient, variable in pairs if coefficient)

    def _add_limit(self, limit: Limit, allowance: mathopt.Variable | float) -> tuple[mathopt.LinearConstraint, float]:
        """Add a limit; returns its row and the factor by which it was scaled."""
        scale = _power_of_two_near(limit.upper)
        upper = limit.upper - limit.constant + TOLERANCE * abs(limit.upper)
        row = self._weighted([coefficient / scale for coefficient in limit.coefficients])
        more = allowance * (abs(limit.upper) / scale)
        return self._model.add_linear_constraint(row <= upper / scale + more), scale

    def exclude(self, chosen: Sequence[int]) -> None:
        """Forbid exactly this solution."""
        self._model.add_linear_constraint(
            mathopt.fast_sum(self._variables[index] for index in chosen) <= len(chosen) - 1
        )

    def solve(self, settings: Settings) -> mathopt.SolveResult:
        """Run the solver, single-threaded and seeded."""
        with _no_output():
            return mathopt.solve(self._model, _SOLVERS[settings.solver], params=_parameters(settings))

    def solve_relaxed(self) -> mathopt.SolveResult:
        """Solve as an LP (the model was built with integer=False)."""
        return mathopt.solve(self._model, mathopt.SolverType.GLOP)

    def chosen(self, result: mathopt.SolveResult) -> tuple[int, ...]:
        """Indices of the chosen choices, in order."""
        values = result.variable_values(self._variables)
        return tuple(index for index, value in enumerate(values) if value > 0.5)


@contextmanager
def _no_output() -> Iterator[None]:
    """Keep what HiGHS prints to the process's standard output, whatever its options say, out of ours."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _power_of_two_near(value: float) -> float:
    return math.ldexp(1.0, math.frexp(value)[1]) if value else 1.0


def _parameters(settings: Settings) -> mathopt.SolveParameters:
    """Deterministic limits, as each solver spells them."""
    parameters = mathopt.SolveParameters(
        random_seed=settings.seed, relative_gap_tolerance=settings.relative_gap, absolute_gap_tolerance=0.0
    )
    if settings.solver == "cp-sat":
        parameters.threads = 1
        parameters.cp_sat.max_number_of_conflicts = settings.node_limit
        return parameters
    parameters.node_limit = settings.node_limit
    if settings.solver == "scip":
        parameters.threads = 1
    else:  # MathOpt refuses `threads` for HiGHS
        parameters.highs.string_options["parallel"] = "off"
    return parameters


def _prices(problem: Problem[Any]) -> dict[str, float]:
    """Duals of the LP relaxation: nats/token per whole upper limit, 0 or more, by the limit's name."""
    model = _Model(problem, [choice.score for choice in problem.choices], integer=False)
    result = model.solve_relaxed()
    assert result.termination.reason == mathopt.TerminationReason.OPTIMAL, result.termination
    duals = {name: (result.dual_values(row), scale) for name, (row, scale) in model.rows.items()}
    uppers = {limit.name: limit.upper for limit in problem.limits}
    return {name: abs(dual * uppers[name] / scale) for name, (dual, scale) in duals.items()}
