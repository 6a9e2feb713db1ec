"""A target's limit at its operating point: for the solver a sum, for people a sentence. No torch.

In: a quantity, the user's number, the cost table. Out: a Limit of the search's problem, and a child's value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from storage.variants import Replacement
from tasks.puzzle.costs.cost_table import CostTable
from tasks.puzzle.search.problem import Limit
from tasks.puzzle.search.quantities import Quantity, measure


@dataclass(frozen=True)
class Bound:
    """A limit at its operating point.

    Attributes:
        name: the constraint's name.
        quantity: the limited quantity.
        limit: the number as the user gave it, in `unit`.
        lower: whether the child must have at least so much.
        relative: whether the limit is a multiple of `parent_value`.
        parent_value: the parent's value, in the metric's unit; None where it has none and the limit is absolute.
        margin: share by which the search tightens the limit.
    """

    name: str
    quantity: Quantity
    limit: float
    lower: bool = False
    relative: bool = False
    parent_value: float | None = None
    margin: float = 0.0

    @property
    def per_unit(self) -> float:
        """Return the metric's value that the user's number 1 stands for."""
        if not self.relative:
            return 1.0
        assert self.parent_value is not None, self.name
        return self.parent_value

    @property
    def unit(self) -> str:
        """Return the unit of the user's number, in words."""
        return "x the parent's" if self.relative else self.quantity.metric.unit

    @property
    def tightening(self) -> float:
        """Return the factor by which the search multiplies the limit, for its safety margin."""
        return 1 + self.margin if self.lower else 1 - self.margin

    def value(self, table: CostTable, blocks: Sequence[Replacement]) -> float:
        """Return the child's value by the cost table, in the user's unit."""
        return measure(table, blocks, self.quantity) / self.per_unit

    def as_limit(self, table: CostTable, replacements: Sequence[Replacement]) -> Limit:
        """Return the solver's limit: an upper limit on a linear sum (throughput >= X is milliseconds <= tokens / X)."""
        sign = -1.0 if self.lower and not self.quantity.inverse else 1.0
        total = self.quantity.total_at(self.limit * self.per_unit * self.tightening)
        return Limit(
            name=self.name,
            text=self.text,
            coefficients=tuple(sign * value for value in self.quantity.parts_of_blocks(table, replacements)),
            constant=sign * self.quantity.fixed_part(table),
            upper=sign * total,
            scale=sign * self.quantity.scale / self.per_unit,
            inverse=self.quantity.inverse,
            unit="x" if self.relative else f" {self.quantity.metric.unit}",
            tightening=self.tightening,
        )

    @property
    def text(self) -> str:
        """Return the limit in words."""
        quantity = self.quantity
        where = f" ({' + '.join(setting.text for setting, _ in quantity.mix)})" if quantity.mix else ""
        if quantity.metric.needs_context:
            where = f" (batch {quantity.batch}, context {quantity.context}, {quantity.precision})"
        unit = self.unit if self.relative else f" {self.unit}"
        margin = f" (with a margin of {self.margin:.0%})" if self.margin else ""
        return f"{self.name}: {quantity.metric.name}{where} {'>=' if self.lower else '<='} {self.limit:g}{unit}{margin}"
