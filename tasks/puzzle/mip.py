"""The search: the replacements with the smallest sum of scores that cover the parent and keep every limit. No torch.

In: a Problem (choices with scores, limits as linear sums over choices). Out: a Solution with objective, proven bound,
gap and what binds; or an InfeasibleError that says which limits exclude each other and how far each can be met.

    minimise    sum_c score_c x_c                     (arXiv 2411.19146, section 3.3, with spans: an exact cover)
    subject to  sum_{c covers block i} x_c = 1        for every block i of the parent
                sum_c coefficient_lc x_c <= upper_l   for every limit l
                x_c in {0, 1}

Solved through ortools MathOpt. Limits of the solver are deterministic (nodes, gap, never seconds), one thread, a
seed: the same problem gives the same answer. The formulation holds joint choices (attention x FFN), so that jointly
measured scores need nothing else; 80 blocks x 54 choices are 4,320 binaries, solved in about a second.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ortools.math_opt.python import mathopt

from storage.files import InputError
from storage.records import Replacement

Solver = Literal["highs", "scip", "cp-sat"]

TOLERANCE = 1e-9
"""A sum may exceed its limit by this share: rounding of sums in double precision, far below any unit of cost."""

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
class Choice:
    """A replacement that the search may take, and what it costs in quality (nats/token)."""

    replacement: Replacement
    score: float


@dataclass(frozen=True)
class Limit:
    """`constant` + the sum of `coefficients` over the chosen replacements must be at most `upper`.

    `coefficients` follow the problem's choices. `text` is the constraint as the user wrote it. For messages the sum is
    turned into the user's value: total * scale, or scale / total where `inverse` (throughput: at least); `unit`
    follows the number, e.g. "x the parent's". `upper` holds the user's limit times `tightening` (a safety margin), so
    that a reachable value divided by it is a limit that the user could set.
    """

    name: str
    text: str
    coefficients: tuple[float, ...]
    constant: float
    upper: float
    scale: float = 1.0
    inverse: bool = False
    unit: str = ""
    tightening: float = 1.0

    def total(self, chosen: Iterable[int]) -> float:
        """The exact sum over chosen choices (indices), constant included."""
        return math.fsum([self.constant, *(self.coefficients[index] for index in chosen)])

    def met_by(self, total: float) -> bool:
        """Whether a sum keeps the limit."""
        return total <= self.upper + TOLERANCE * abs(self.upper)

    def in_user_units(self, total: float) -> float:
        """The user's value of a sum."""
        if self.inverse:
            return self.scale / total if total else math.inf
        return total * self.scale


@dataclass(frozen=True)
class Problem:
    """What to search: `choices` sorted by replacement, each replacement once; `name` is the target's."""

    name: str
    num_blocks: int
    choices: tuple[Choice, ...]
    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        replacements = [choice.replacement for choice in self.choices]
        assert replacements == sorted(set(replacements)), "choices must be sorted and distinct"
        assert all(len(limit.coefficients) == len(self.choices) for limit in self.limits)


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
class Solution:
    """The chosen replacements in order, with the proof: `bound` <= any feasible sum of scores, nats/token.

    `gap` = (objective - bound) / |objective|. `status` is "optimal" (gap within the settings') or "node_limit" (the
    best found when the limit was hit).
    """

    chosen: tuple[Choice, ...]
    objective: float
    bound: float
    gap: float
    status: Literal["optimal", "node_limit"]
    nodes: int
    seconds: float
    uses: tuple[LimitUse, ...]


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
        shown = _rounded(self.best, up=not self.limit.inverse)
        return f"{self.limit.text}: best reachable {shown}{self.limit.unit} with the others kept"


class InfeasibleError(InputError):
    """No child meets all limits. `conflicts` cannot be met together; without any one of them the others can."""

    exit_code = 3

    def __init__(self, message: str, conflicts: tuple[Conflict, ...] = ()) -> None:
        """Keep the conflicts beside the message (its only argument, so that runners can copy the error)."""
        super().__init__(message)
        self.conflicts = conflicts


def solve(problem: Problem, settings: Settings) -> Solution:
    """The best cover of the parent's blocks that keeps every limit.

    Raises:
        InfeasibleError: there is none; the limits at fault are named.
        InputError: some block has no choice, the node limit was hit before a child was found, or the solver failed.
    """
    start = time.perf_counter()
    _check_cover(problem)
    scores = [choice.score for choice in problem.choices]
    found = _minimise(problem, scores, settings)
    if found is None:
        raise _infeasible(problem, settings)
    objective = math.fsum(scores[index] for index in found.chosen)
    bound = min(found.bound, objective)
    prices = _prices(problem, scores)
    return Solution(
        chosen=tuple(problem.choices[index] for index in found.chosen),
        objective=objective,
        bound=bound,
        gap=(objective - bound) / abs(objective) if objective else 0.0,
        status="node_limit" if found.limit_hit else "optimal",
        nodes=found.nodes,
        seconds=time.perf_counter() - start,
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


def _check_cover(problem: Problem) -> None:
    """Raise InputError unless the choices can cover every block of the parent."""
    starts = defaultdict(list)
    for choice in problem.choices:
        starts[choice.replacement.first_block].append(choice.replacement.parent_blocks.stop)
    reached = {0}
    for block_index in range(problem.num_blocks):
        if block_index in reached:
            reached.update(starts[block_index])
    if problem.num_blocks not in reached:
        last = max(index for index in reached if index <= problem.num_blocks)
        raise InputError(
            f"{problem.name}: no set of replacements covers the parent's {problem.num_blocks} blocks: none that is "
            f"allowed goes on from block {last}"
        )


@dataclass(frozen=True)
class _Found:
    """A feasible choice of indices, checked exactly, with the solver's bound."""

    chosen: tuple[int, ...]
    bound: float
    nodes: int
    limit_hit: bool


def _minimise(problem: Problem, objective: Sequence[float], settings: Settings) -> _Found | None:
    """Minimise the sum of `objective` over covers that keep the limits; None when there are none.

    Solvers work within a tolerance. A solution that exceeds a limit in the exact sum is excluded (by a cut that
    removes it alone) and the problem solved again, so what comes back keeps every limit and the bound stays valid.
    """
    model = _Model(problem, objective)
    nodes = 0
    for _ in range(_MAX_REPAIRS):
        result = model.solve(settings)
        nodes += result.solve_stats.node_count
        if result.termination.reason in _NO_SOLUTION:
            return None
        if not result.has_primal_feasible_solution():
            raise _failure(problem, settings, result)
        chosen = model.chosen(result)
        assert sorted(_covered(problem, chosen)) == list(range(problem.num_blocks)), chosen
        if all(limit.met_by(limit.total(chosen)) for limit in problem.limits):
            bound = result.termination.objective_bounds.dual_bound
            hit = result.termination.reason == mathopt.TerminationReason.FEASIBLE
            return _Found(chosen, bound, nodes, hit)
        model.exclude(chosen)
    raise InputError(
        f"{problem.name}: {settings.solver} returned {_MAX_REPAIRS} solutions that exceed a limit by rounding; "
        "move the limit a little"
    )


def _failure(problem: Problem, settings: Settings, result: mathopt.SolveResult) -> InputError:
    reason = result.termination.reason
    if reason == mathopt.TerminationReason.NO_SOLUTION_FOUND:
        return InputError(
            f"{problem.name}: {settings.solver} found no child within {settings.node_limit} nodes, nor that there is "
            "none; raise search_architecture.node_limit"
        )
    return InputError(
        f"{problem.name}: {settings.solver} ended with {reason.name} ({result.termination.detail}); try another "
        f"search_architecture.solver ({', '.join(_SOLVERS)})"
    )


def _covered(problem: Problem, chosen: Iterable[int]) -> list[int]:
    return [block for index in chosen for block in problem.choices[index].replacement.parent_blocks]


class _Model:
    """A MathOpt model of a problem. Rows are scaled by powers of two, which changes no digit of the coefficients."""

    def __init__(self, problem: Problem, objective: Sequence[float], integer: bool = True) -> None:
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
        self.rows = {limit.name: self._add_limit(limit) for limit in problem.limits}
        self._model.minimize(self._weighted(objective))

    def _weighted(self, coefficients: Sequence[float]) -> mathopt.LinearSum:
        pairs = zip(coefficients, self._variables, strict=True)
        return mathopt.fast_sum(coefficient * variable for coefficient, variable in pairs if coefficient)

    def _add_limit(self, limit: Limit) -> tuple[mathopt.LinearConstraint, float]:
        """Add a limit; returns its row and the factor by which it was scaled."""
        scale = _power_of_two_near(limit.upper)
        upper = limit.upper - limit.constant + TOLERANCE * abs(limit.upper)
        row = self._weighted([coefficient / scale for coefficient in limit.coefficients])
        return self._model.add_linear_constraint(row <= upper / scale), scale

    def exclude(self, chosen: Sequence[int]) -> None:
        """Forbid exactly this solution."""
        self._model.add_linear_constraint(
            mathopt.fast_sum(self._variables[index] for index in chosen) <= len(chosen) - 1
        )

    def solve(self, settings: Settings) -> mathopt.SolveResult:
        """Run the solver, single-threaded and seeded."""
        return mathopt.solve(self._model, _SOLVERS[settings.solver], params=_parameters(settings))

    def solve_relaxed(self) -> mathopt.SolveResult:
        """Solve as an LP (the model was built with integer=False)."""
        return mathopt.solve(self._model, mathopt.SolverType.GLOP)

    def chosen(self, result: mathopt.SolveResult) -> tuple[int, ...]:
        """Indices of the chosen choices, in order."""
        values = result.variable_values(self._variables)
        return tuple(index for index, value in enumerate(values) if value > 0.5)


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


def _infeasible(problem: Problem, settings: Settings) -> InfeasibleError:
    conflicts = _conflicts(problem, settings)
    which = "this limit cannot be met" if len(conflicts) == 1 else "these limits cannot be met together"
    lines = "".join(f"\n  {conflict.text}" for conflict in conflicts)
    loosen = f"loosen one (targets.{problem.name}.constraints)"
    return InfeasibleError(f"no child of {problem.name} exists: {which}; {loosen}:{lines}", conflicts)


def _conflicts(problem: Problem, settings: Settings) -> tuple[Conflict, ...]:
    """Limits that exclude each other (a minimal set, by leaving out one at a time), each with its best value."""
    kept = list(problem.limits)
    for limit in problem.limits:
        fewer = [other for other in kept if other is not limit]
        nothing = [0.0] * len(problem.choices)
        if _minimise(replace(problem, limits=tuple(fewer)), nothing, settings) is None:
            kept = fewer
    return tuple(Conflict(limit, _best(problem, limit, settings)) for limit in kept)


def _best(problem: Problem, limit: Limit, settings: Settings) -> float | None:
    """The best limit that could be set here with all others kept; None when they cannot be kept."""
    others = tuple(other for other in problem.limits if other is not limit)
    found = _minimise(replace(problem, limits=others), limit.coefficients, settings)
    return None if found is None else limit.in_user_units(limit.total(found.chosen)) / limit.tightening


def _prices(problem: Problem, scores: Sequence[float]) -> dict[str, float]:
    """Duals of the LP relaxation: nats/token per whole upper limit, 0 or more, by the limit's name."""
    model = _Model(problem, scores, integer=False)
    result = model.solve_relaxed()
    assert result.termination.reason == mathopt.TerminationReason.OPTIMAL, result.termination
    duals = {name: (result.dual_values(row), scale) for name, (row, scale) in model.rows.items()}
    uppers = {limit.name: limit.upper for limit in problem.limits}
    return {name: abs(dual * uppers[name] / scale) for name, (dual, scale) in duals.items()}


def _rounded(value: float, up: bool) -> str:
    """Three significant digits, rounded towards the side that can be met."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    steps = math.ceil(value / step - TOLERANCE) if up else math.floor(value / step + TOLERANCE)
    return f"{steps * step:.10g}"
