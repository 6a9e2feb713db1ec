"""A target's limit at its operating point: for the solver a sum, for people a sentence, for files JSON. No torch.

In: a quantity, the user's number, the cost table. Out: what the search, architecture.json and messages say of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storage.records import Metric, Replacement
from tasks.puzzle.costs import GIB, CostTable, Setting
from tasks.puzzle.problem import Limit
from tasks.puzzle.quantities import Quantity, measure

UNITS: dict[Metric, str] = {
    "params": "parameters",
    "block_params": "parameters",
    "attention_blocks": "blocks",
    "weight_bytes": "bytes",
    "kv_bytes": "bytes/token",
    "memory_gib": "GiB",
    "throughput": "tokens/s",
    "decode_throughput": "tokens/s",
    "latency_ms": "ms",
    "time_to_first_token_ms": "ms",
    "time_per_token_ms": "ms",
}


@dataclass(frozen=True)
class Bound:
    """A limit at its operating point: `limit` as the user gave it, a multiple of `parent_value` where `relative`."""

    name: str
    quantity: Quantity
    limit: float
    lower: bool = False
    relative: bool = False
    parent_value: float = 1.0
    margin: float = 0.0

    @property
    def per_unit(self) -> float:
        """The metric's value that the user's number 1 stands for."""
        return self.parent_value if self.relative else 1.0

    @property
    def tightening(self) -> float:
        """What the search multiplies the limit with, for its safety margin."""
        return 1 + self.margin if self.lower else 1 - self.margin

    def measured(self, table: CostTable, blocks: Sequence[Replacement]) -> float:
        """The child's value, in the user's unit."""
        return measure(table, blocks, self.quantity) / self.per_unit

    def as_limit(self, table: CostTable, replacements: Sequence[Replacement]) -> Limit:
        """For the solver: a linear sum that is at most something (throughput >= X is milliseconds <= tokens / X)."""
        sign = -1.0 if self.lower and not self.quantity.inverse else 1.0
        total = self.quantity.total_at(self.limit * self.per_unit * self.tightening)
        return Limit(
            name=self.name,
            text=self.text,
            coefficients=tuple(sign * value for value in self.quantity.of_blocks(table, replacements)),
            constant=sign * self.quantity.fixed(table),
            upper=sign * total,
            scale=sign * self.quantity.scale / self.per_unit,
            inverse=self.quantity.inverse,
            unit="x" if self.relative else f" {UNITS[self.quantity.metric]}",
            tightening=self.tightening,
        )

    @property
    def text(self) -> str:
        """The limit in words."""
        quantity = self.quantity
        where = f" ({' + '.join(setting.text for setting, _ in quantity.mix)})" if quantity.mix else ""
        if quantity.metric == "memory_gib":
            where = f" (batch {quantity.batch}, context {quantity.context}, {quantity.precision})"
        unit = "x the parent's" if self.relative else f" {UNITS[quantity.metric]}"
        margin = f" (with a margin of {self.margin:.0%})" if self.margin else ""
        return f"{self.name}: {quantity.metric}{where} {'>=' if self.lower else '<='} {self.limit:g}{unit}{margin}"

    def to_json(self, table: CostTable, blocks: Sequence[Replacement]) -> dict[str, Any]:
        """The limit with where it holds and what the tables predict for a child: an entry of architecture.json."""
        quantity = self.quantity
        where: dict[str, Any] = {}
        if quantity.setting:
            where = setting_json(quantity.setting)
            if len(quantity.mix) > 1:
                where["mix"] = [{**setting_json(setting), "share": share} for setting, share in quantity.mix]
        elif quantity.metric == "memory_gib":
            where = {"batch": quantity.batch, "context": quantity.context, "tensor_parallel": quantity.tensor_parallel}
            where["workspace_gib"] = quantity.workspace_bytes / GIB
        return {
            "name": self.name,
            "metric": quantity.metric,
            "kind": "at_least" if self.lower else "at_most",
            "limit": self.limit,
            "predicted": self.measured(table, blocks),
            "relative": self.relative,
            "unit": "x the parent's" if self.relative else UNITS[quantity.metric],
            **where,
        }

    def speed_ratio(self, table: CostTable, blocks: Sequence[Replacement]) -> float:
        """Of a speed limit, how much faster than the parent: child / parent, for a latency parent / child."""
        child = measure(table, blocks, self.quantity)
        return child / self.parent_value if self.quantity.inverse else self.parent_value / child

    def speed_json(self, table: CostTable, blocks: Sequence[Replacement]) -> dict[str, Any]:
        """Of a speed limit, the speeds of child and parent and where they hold."""
        setting = self.quantity.setting
        assert setting is not None, self
        return {
            "metric": self.quantity.metric,
            "unit": UNITS[self.quantity.metric],
            "child": measure(table, blocks, self.quantity),
            "parent": self.parent_value,
            **setting_json(setting),
            "origin": table.origin(setting),
        }


def setting_json(setting: Setting) -> dict[str, Any]:
    """Where milliseconds hold, as JSON."""
    return {
        "hardware": setting.hardware,
        "engine": setting.engine,
        "precision": setting.precision,
        "tensor_parallel": setting.tensor_parallel,
        "scenario": setting.scenario,
        "batch": setting.batch,
    }
