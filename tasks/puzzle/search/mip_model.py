"""A search problem as a model of ortools MathOpt, solved by HiGHS (or GLOP where it is relaxed to an LP). No torch.

In: a Problem and what to minimise. Out: MathOpt's results, and the choices that they take.
"""

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ortools.math_opt.python import mathopt

from tasks.puzzle.search.problem import TOLERANCE, Limit, Problem

_LARGEST_SCORE = 1024.0
"""The size that the objective's largest coefficient is scaled to, so that much smaller ones count."""


class MipModel:
    """A MathOpt model of a problem. Rows and objective are scaled by powers of two, which changes no digit.

    Solvers have absolute tolerances: a sum of scores of 1e-7 would be nothing to them. With `soft` limits, the share by
    which each is exceeded is added to the objective; rules stay hard. `rows` holds the row of each limit by name, and
    the factor by which it was divided; the objective was divided by `unit`.
    """

    def __init__(
        self, problem: Problem[Any], objective: Sequence[float], integer: bool = True, soft: bool = False
    ) -> None:
        """Build the model of `problem` that minimises the sum of `objective` (a coefficient for each choice)."""
        self._model = mathopt.Model(name=problem.name)
        self._variables = [
            self._model.add_variable(lb=0.0, ub=1.0, is_integer=integer, name=str(index))
            for index in range(len(problem.choices))
        ]
        self._add_cover(problem)
        excesses = []
        self.rows: dict[str, tuple[mathopt.LinearConstraint, float]] = {}
        for limit in problem.limits:
            allowance: mathopt.Variable | float = 0.0
            if soft and not limit.is_rule:
                allowance = self._model.add_variable(lb=0.0)
                excesses.append(allowance)
            self.rows[limit.name] = self._add_limit(limit, allowance)
        self.unit = _power_of_two_near(max(map(abs, objective), default=0.0)) / _LARGEST_SCORE
        scaled = [coefficient / self.unit for coefficient in objective]
        self._model.minimize(self._weighted(scaled) + mathopt.fast_sum(excesses))

    def _add_cover(self, problem: Problem[Any]) -> None:
        """Cover every block exactly once."""
        covering = defaultdict(list)
        for variable, choice in zip(self._variables, problem.choices, strict=True):
            for block in choice.replacement.parent_blocks:
                covering[block].append(variable)
        for block in range(problem.num_blocks):
            self._model.add_linear_constraint(mathopt.fast_sum(covering[block]) == 1.0)

    def _weighted(self, coefficients: Sequence[float]) -> mathopt.LinearSum:
        pairs = zip(coefficients, self._variables, strict=True)
        return mathopt.fast_sum(coefficient * variable for coefficient, variable in pairs if coefficient)

    def _add_limit(self, limit: Limit, allowance: mathopt.Variable | float) -> tuple[mathopt.LinearConstraint, float]:
        """Add a limit; returns its row and the factor by which it was scaled."""
        scale = _power_of_two_near(limit.upper)
        upper = limit.upper - limit.constant + TOLERANCE * abs(limit.upper)
        row = self._weighted([coefficient / scale for coefficient in limit.coefficients])
        excess = allowance * (abs(limit.upper) / scale)
        return self._model.add_linear_constraint(row <= upper / scale + excess), scale

    def exclude(self, chosen: Sequence[int]) -> None:
        """Forbid exactly this solution."""
        self._model.add_linear_constraint(
            mathopt.fast_sum(self._variables[index] for index in chosen) <= len(chosen) - 1
        )

    def solve(self, parameters: mathopt.SolveParameters) -> mathopt.SolveResult | None:
        """Run HiGHS; None where it refuses the numbers, which lie too far from each other."""
        with _no_output(), _refused_numbers():
            return mathopt.solve(self._model, mathopt.SolverType.HIGHS, params=parameters)
        return None

    def solve_relaxed(self) -> mathopt.SolveResult | None:
        """Solve as an LP (the model was built with integer=False); None as above."""
        with _refused_numbers():
            return mathopt.solve(self._model, mathopt.SolverType.GLOP)
        return None

    def chosen(self, result: mathopt.SolveResult) -> tuple[int, ...]:
        """Return the indices of the chosen choices, in order."""
        values = result.variable_values(self._variables)
        return tuple(index for index, value in enumerate(values) if value > 0.5)


@contextmanager
def _refused_numbers() -> Iterator[None]:
    """Go on behind a model that a solver refuses: MathOpt means to raise its error and fails over it."""
    try:
        yield
    except AttributeError as error:
        if type(error.__context__).__name__ != "StatusNotOk":
            raise


@contextmanager
def _no_output() -> Iterator[None]:
    """Discard what HiGHS prints to the process's standard output, which no option of it turns off."""
    sys.stdout.flush()
    stdout = os.dup(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(devnull)


def _power_of_two_near(value: float) -> float:
    return math.ldexp(1.0, math.frexp(value)[1] - 1) if value else 1.0
