"""Bounds by Lagrangian relaxation: how good a child can be at best, and which choices can be part of a better one.

In: a Problem. Out: a proven lower bound on its sum of scores, the best cover met that keeps every limit, and for every
choice a lower bound of the covers that hold it. No torch.

For multipliers m >= 0 of the limits (Fisher 1981, The Lagrangian relaxation method, section 2)

    L(m) = min over covers of sum_c (score_c + sum_l m_l coefficient_lc)  -  sum_l m_l (upper_l - constant_l)

is at most the optimum, and its minimiser is a shortest path from block 0 to the last one. L is concave: each cover met
is a plane above it, and the highest point under all planes is where to look next (Kelley 1960), halfway from the best
multipliers so far (Ben-Ameur and Neto 2007).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.math_opt.python import mathopt

from tasks.puzzle.search.problem import TOLERANCE, Problem

_ROUNDS = 60
_CLOSE = 1e-7
_STEEPEST = 1e3
"""Upper bound of each multiplier, times the largest sum of scores; any bound keeps the result valid."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LagrangianBounds:
    """The bounds that the relaxation proves of a problem, nats/token.

    `bound` <= the optimum; it is inf where certainly no feasible cover exists. `chosen` is the best cover (indices) met
    on the way that keeps every limit, with its sum of scores `objective`; None and inf where none was met.
    `through[c]` <= the score of any feasible cover that holds choice c.
    """

    bound: float
    chosen: tuple[int, ...] | None
    objective: float
    through: Floats


class Relaxation:
    """The covers of one set of choices, prepared for many sets of limits: what the operating points share."""

    def __init__(self, problem: Problem[Any]) -> None:
        """Take the choices of `problem`; its limits are given with each call."""
        ranges = [choice.replacement.parent_blocks for choice in problem.choices]
        starts = [index for index, blocks in enumerate(ranges) if index == 0 or blocks != ranges[index - 1]]
        self._problem = problem
        # The ranges of blocks that choices cover, sorted: edges of the graph whose paths are the covers.
        self._edges = [(ranges[index].start, ranges[index].stop) for index in starts]
        # Edge e has the choices starts[e] .. stops[e] - 1.
        self._starts = np.array(starts)
        self._stops = np.array([*starts[1:], len(ranges)])
        self._edge_of_choice = np.repeat(np.arange(len(starts)), self._stops - self._starts)
        scores = np.array([choice.score for choice in problem.choices])
        # Scores are divided by a power of two near the largest, since the master's solver has absolute tolerances.
        self._unit = float(np.exp2(np.floor(np.log2(np.abs(scores).max(initial=0.0) or 1.0))))
        self._scores = scores / self._unit
        largest = np.maximum.reduceat(np.abs(self._scores), self._starts)
        self._ceiling = float(largest.sum()) + 1.0  # above the score of any cover

    def bounds(self, problem: Problem[Any]) -> LagrangianBounds:
        """Compute the bounds of `problem`, which has the choices that this relaxation was made of."""
        assert problem.choices is self._problem.choices
        rows, room, scales = _scaled(problem)
        master = _Master(len(scales), _STEEPEST * self._ceiling)
        best, best_multipliers = -math.inf, np.zeros(len(scales))
        chosen: tuple[int, ...] | None = None
        objective, multipliers = math.inf, best_multipliers
        for _ in range(_ROUNDS):
            cover, length = self._shortest(self._scores + multipliers @ rows)
            if not cover:
                return LagrangianBounds(math.inf, None, math.inf, np.full(len(self._scores), math.inf))
            value = length - float(multipliers @ room)
            if value > best:
                best, best_multipliers = value, multipliers
            if best > self._ceiling:
                break
            score = problem.score(cover) / self._unit
            if score < objective and problem.kept_by(cover):
                chosen, objective = cover, score
            upper, proposed = master.add(score, rows[:, list(cover)].sum(axis=1) - room)
            if upper - best <= _CLOSE * abs(best) or not len(scales):
                break
            multipliers = (best_multipliers + proposed) / 2
        rounding = TOLERANCE * (abs(best) + float(best_multipliers @ np.abs(room)))
        bound = best - rounding if best - rounding <= self._ceiling else math.inf
        through = (
            self.lightest_through(self._scores + best_multipliers @ rows) - float(best_multipliers @ room) - rounding
        )
        return LagrangianBounds(bound * self._unit, chosen, objective * self._unit, through * self._unit)

    def _shortest(self, weights: Floats) -> tuple[tuple[int, ...], float]:
        """Find the cover of least weight, as indices of choices, and its weight; empty where no cover exists."""
        least = np.minimum.reduceat(weights, self._starts).tolist()
        lengths, arrivals = self._forward(least)
        if math.isinf(lengths[-1]):
            return (), math.inf
        path, block = [], self._problem.num_blocks
        while block:
            edge = arrivals[block]
            start, stop = int(self._starts[edge]), int(self._stops[edge])
            path.append(start + int(np.argmin(weights[start:stop])))
            block = self._edges[edge][0]
        return tuple(reversed(path)), lengths[-1]

    def _forward(self, least: Sequence[float]) -> tuple[list[float], list[int]]:
        """Return the length of the shortest path to each block, and the edge by which it arrives.

        `least` is the weight of each edge: that of its lightest choice.
        """
        count = self._problem.num_blocks
        lengths, arrivals = [0.0, *[math.inf] * count], [-1] * (count + 1)
        for edge, (first, stop) in enumerate(self._edges):  # sorted by first block, so `first` is final
            if stop <= count and lengths[first] + least[edge] < lengths[stop]:
                lengths[stop], arrivals[stop] = lengths[first] + least[edge], edge
        return lengths, arrivals

    def lightest_through(self, weights: Floats) -> Floats:
        """Return the weight of the lightest cover that holds each choice, inf where none does."""
        count = self._problem.num_blocks
        least = np.minimum.reduceat(weights, self._starts).tolist()
        before, _ = self._forward(least)
        after = [*[math.inf] * count, 0.0]
        for (first, stop), lightest in zip(reversed(self._edges), reversed(least), strict=True):
            if stop <= count:
                after[first] = min(after[first], lightest + after[stop])
        rests = [before[first] + (after[stop] if stop <= count else math.inf) for first, stop in self._edges]
        return np.asarray(weights + np.array(rests)[self._edge_of_choice])


def _scaled(problem: Problem[Any]) -> tuple[Floats, Floats, Floats]:
    """Return rows [limits, choices] and room of the limits, each divided by its scale, and the scales.

    So multipliers of different limits are of one size.
    """
    rows = np.array([limit.coefficients for limit in problem.limits]).reshape(len(problem.limits), len(problem.choices))
    room = np.array([limit.upper + TOLERANCE * abs(limit.upper) - limit.constant for limit in problem.limits])
    scales = np.maximum(np.abs(room), np.abs(rows).max(axis=1, initial=0.0))
    scales[scales == 0] = 1.0
    return rows / scales[:, None], room / scales, scales


class _Master:
    """The master problem of the cutting planes: the highest point under all planes so far."""

    def __init__(self, dimensions: int, largest: float) -> None:
        model = mathopt.Model()
        self._height = model.add_variable()
        self._point = [model.add_variable(lb=0.0, ub=largest) for _ in range(dimensions)]
        model.maximize(self._height)
        self._model = model
        self._solver = mathopt.IncrementalSolver(model, mathopt.SolverType.GLOP)

    def add(self, constant: float, slope: Floats) -> tuple[float, Floats]:
        """Add a plane; returns the height of the highest point under all planes, and that point (multipliers)."""
        products = (float(rise) * variable for rise, variable in zip(slope, self._point, strict=True))
        self._model.add_linear_constraint(self._height <= constant + mathopt.fast_sum(products))
        result = self._solver.solve()
        if not result.has_primal_feasible_solution():  # GLOP gave up: stop here, the best bound so far is valid
            return -math.inf, np.zeros(len(self._point))
        return result.objective_value(), np.array(result.variable_values(self._point), dtype=np.float64)
