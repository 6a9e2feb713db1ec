"""The solver: the replacements with the smallest sum of scores that cover the parent and keep every limit. No torch.

In: a Problem and its Lagrangian relaxation, which leaves out most choices; HiGHS solves what remains (arXiv
2411.19146, section 3.3). Out: a cover with a proven bound, None where there is none; a Solution says what it uses of
each limit. The solver's own limits are deterministic (nodes and gap, never seconds), on one thread with a seed: the
same problem gives the same answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal

import numpy as np
from ortools.math_opt.python import mathopt

from storage.files import InputError
from tasks.puzzle.search.lagrangian import LagrangianBounds, Relaxation
from tasks.puzzle.search.mip_model import MipModel
from tasks.puzzle.search.problem import TOLERANCE, Choice, Limit, P, Problem

SOLVER_NAME = "highs"
"""The solver's name in search.json; docs/search.md has the measurement that chose it."""

Status = Literal["optimal", "node_limit"]

_MAX_REPAIRS = 1_000
_BEYOND_MEASURE = 1e6
"""A multiple of a limit, or of the best sum of scores, beyond which a number stands for "never"."""
_NO_SOLUTION = (
    mathopt.TerminationReason.INFEASIBLE,
    mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED,  # every variable is bounded
)


@dataclass(frozen=True)
class SolverSettings:
    """The gap at which the solver stops, the branch-and-bound nodes after which it gives up, and its seed."""

    relative_gap: float = 1e-6
    node_limit: int = 1_000_000
    seed: int = 0


@dataclass(frozen=True)
class LimitUse:
    """A solution's use of a limit: the allowed value (without its margin) and the reached one, in the user's unit.

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
        """Tell whether loosening the limit a little would improve the relaxed optimum."""
        return self.price > TOLERANCE


@dataclass(frozen=True)
class Solution(Generic[P]):
    """The chosen replacements in order, with the proof: `bound` <= any feasible sum of scores, nats/token.

    `status` is "optimal" (the gap is within the settings') or "node_limit" (the best cover that the solver had when it
    reached the limit).
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
        """Return the proof's relative gap, (objective - bound) / |objective|."""
        return (self.objective - self.bound) / abs(self.objective) if self.objective else 0.0


@dataclass(frozen=True)
class ProvenCover:
    """A cover (indices of choices) that keeps every limit exactly, with a proven bound of the problem."""

    chosen: tuple[int, ...]
    bound: float
    nodes: int
    limit_hit: bool


def solution(problem: Problem[P], cover: ProvenCover, bound: float, seconds: float) -> Solution[P]:
    """Return the cover as a solution that says what it uses of each limit; `bound` may be below the cover's own."""
    objective = problem.score(cover.chosen)
    prices = _prices(problem, objective)
    return Solution(
        chosen=tuple(problem.choices[index] for index in cover.chosen),
        objective=objective,
        bound=min(bound, objective),
        status="node_limit" if cover.limit_hit else "optimal",
        nodes=cover.nodes,
        seconds=seconds,
        uses=tuple(_use(limit, cover.chosen, prices[limit.name]) for limit in problem.limits if not limit.is_rule),
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


def best_cover_within(
    problem: Problem[Any], bounds: LagrangianBounds, score_limit: float, settings: SolverSettings
) -> ProvenCover | None:
    """Find the best cover with a score of at most `score_limit`, given the problem's relaxation; None if there is none.

    Choices that no such cover can hold are left out before the solver sees the problem.

    Raises:
        InputError: the node limit was hit before a cover was found, or the solver failed.
    """
    score_limit = min(score_limit, bounds.objective)
    if bounds.bound == math.inf or bounds.bound > score_limit + TOLERANCE * abs(score_limit):
        return None
    if bounds.chosen is not None and bounds.objective <= score_limit and _closes(bounds, settings):
        return ProvenCover(bounds.chosen, bounds.bound, 0, limit_hit=False)
    indices = [
        index for index, least in enumerate(bounds.through) if least <= score_limit + TOLERANCE * abs(score_limit)
    ]
    reduced = problem.restricted_to(indices)
    cover, limit_hit = minimise(reduced, [choice.score for choice in reduced.choices], settings)
    if cover is not None:
        return replace(cover, chosen=tuple(indices[index] for index in cover.chosen))
    if limit_hit and bounds.chosen is not None and bounds.objective <= score_limit:
        return ProvenCover(bounds.chosen, bounds.bound, settings.node_limit, limit_hit=True)
    if limit_hit:
        raise InputError(
            f"{problem.name}: HiGHS found no child within {settings.node_limit} nodes, nor a proof that there is "
            "none; raise search_architecture.node_limit"
        )
    return None


def _closes(bounds: LagrangianBounds, settings: SolverSettings) -> bool:
    """Tell whether the relaxation alone proves its cover."""
    return bounds.objective - bounds.bound <= settings.relative_gap * abs(bounds.objective)


def minimise(
    problem: Problem[Any], objective: Sequence[float], settings: SolverSettings
) -> tuple[ProvenCover | None, bool]:
    """Minimise the sum of `objective` over covers that keep the limits.

    The solver works within a tolerance. A solution that exceeds a limit in the exact sum is excluded (by a cut that
    removes it alone) and the problem solved again, so what comes back keeps every limit and the bound stays valid.

    Returns:
        The best cover, None when there is none or none was found; and whether the node limit was hit.

    Raises:
        InputError: the solver failed.
    """
    indices = _possible(problem)
    if not indices:
        return None, False
    cover, limit_hit = _minimise(problem.restricted_to(indices), [objective[index] for index in indices], settings)
    if cover is None:
        return None, limit_hit
    return replace(cover, chosen=tuple(indices[index] for index in cover.chosen)), limit_hit


def _possible(problem: Problem[Any], excess: float = 2 * TOLERANCE) -> list[int]:
    """Return the choices (indices) that some cover holds which exceeds a limit by so much at most, for each limit.

    A number that stands for "never" goes here, before it spoils the solver's arithmetic.

    Args:
        problem: the problem.
        excess: share of a limit.
    """
    relaxation, possible = Relaxation(problem), np.ones(len(problem.choices), bool)
    for limit in problem.limits:
        totals = limit.constant + relaxation.lightest_through(np.array(limit.coefficients, np.float64))
        possible &= totals <= limit.upper + excess * (abs(limit.upper) + abs(limit.constant))
    return [int(index) for index in np.flatnonzero(possible)]


def _minimise(
    problem: Problem[Any], objective: Sequence[float], settings: SolverSettings
) -> tuple[ProvenCover | None, bool]:
    """Minimise over what :func:`_possible` leaves."""
    model = MipModel(problem, objective)
    parameters = _parameters(settings)
    nodes = 0
    for _ in range(_MAX_REPAIRS):
        result = model.solve(parameters)
        if result is None:
            raise InputError(
                f"{problem.name}: HiGHS refuses its scores and costs, which lie too far from each other; leave out a "
                f"variant rather than give it a huge number, and check the limits ({problem.where})"
            )
        nodes += result.solve_stats.node_count
        reason = result.termination.reason
        if reason in _NO_SOLUTION:
            return None, False
        if not result.has_primal_feasible_solution():
            if reason == mathopt.TerminationReason.NO_SOLUTION_FOUND:
                return None, True
            raise InputError(
                f"{problem.name}: HiGHS ended with {reason.name} ({result.termination.detail}) and no solution; move "
                f"a limit a little ({problem.where}) or raise search_architecture.relative_gap"
            )
        chosen = model.chosen(result)
        covered = [block for index in chosen for block in problem.choices[index].replacement.parent_blocks]
        assert sorted(covered) == list(range(problem.num_blocks)), chosen
        if problem.kept_by(chosen):
            limit_hit = reason == mathopt.TerminationReason.FEASIBLE
            bound = result.termination.objective_bounds.dual_bound * model.unit
            return ProvenCover(chosen, bound, nodes, limit_hit), limit_hit
        model.exclude(chosen)
    raise InputError(
        f"{problem.name}: HiGHS returned {_MAX_REPAIRS} solutions that exceed a limit by rounding; move the limit a "
        f"little ({problem.where})"
    )


def minimise_excess(problem: Problem[Any], settings: SolverSettings) -> ProvenCover | None:
    """Find the cover that exceeds the limits by least, summed over shares of each limit; None if no cover was found.

    Its `bound` is that of the excess. Where the solver refuses the numbers none is found: it only serves a message.
    """
    model = MipModel(problem, [0.0] * len(problem.choices), soft=True)
    result = model.solve(_parameters(settings))
    if result is None or not result.has_primal_feasible_solution():
        return None
    limit_hit = result.termination.reason == mathopt.TerminationReason.FEASIBLE
    return ProvenCover(model.chosen(result), result.termination.objective_bounds.dual_bound, 0, limit_hit)


def _parameters(settings: SolverSettings) -> mathopt.SolveParameters:
    """Return the settings for HiGHS on one thread (MathOpt refuses its own `threads` for HiGHS)."""
    parameters = mathopt.SolveParameters(
        random_seed=settings.seed,
        relative_gap_tolerance=settings.relative_gap,
        absolute_gap_tolerance=0.0,
        node_limit=settings.node_limit,
    )
    parameters.highs.string_options["parallel"] = "off"
    return parameters


def _prices(problem: Problem[Any], objective: float) -> dict[str, float]:
    """Return the duals of the LP relaxation: nats/token per whole upper limit, 0 or more, by the limit's name.

    A choice that alone exceeds a limit, or the best sum, `objective`, beyond all measure has no part in it.
    """
    most = _BEYOND_MEASURE * objective if objective > 0 else math.inf
    possible = [index for index in _possible(problem, _BEYOND_MEASURE) if problem.choices[index].score <= most]
    problem = problem.restricted_to(possible)
    model = MipModel(problem, [choice.score for choice in problem.choices], integer=False)
    result = model.solve_relaxed()
    if result is None or not result.has_dual_feasible_solution():
        raise InputError(
            f"{problem.name}: its limits have no prices, since scores and costs lie too far from each other; leave out "
            "a variant rather than give it a huge number"
        )
    prices = {}
    for limit in problem.limits:
        row, scale = model.rows[limit.name]
        prices[limit.name] = abs(result.dual_values(row) * model.unit * limit.upper / scale)
    return prices
