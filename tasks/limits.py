"""A target's constraints as limits of the search, and what the tables predict for a choice of blocks.

Shared by search_architecture and search_baselines: the parent's facts, each constraint at its operating point, the
problem that the solver gets, and the predicted sizes and speeds of an architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from storage.files import DamagedFileError, read_json
from storage.model_config import ModelConfig
from storage.params import SPEED_METRICS, Constraint, Params
from storage.paths import Paths
from storage.records import Metric, Replacement, Weights
from storage.tables import read_costs, read_scores
from tasks.puzzle.costs import GIB, CostTable, Quantity, Setting, measure, model_sizes
from tasks.puzzle.problem import Choice, Limit, Problem
from tasks.puzzle.score_rule import Scores
from tasks.puzzle.variants import parent_blocks

UNITS: dict[Metric, str] = {
    "params": "parameters",
    "block_params": "parameters",
    "weight_bytes": "bytes",
    "kv_bytes": "bytes/token",
    "memory_gib": "GiB",
    "throughput": "tokens/s",
    "decode_throughput": "tokens/s",
    "latency_ms": "ms",
}


@dataclass(frozen=True)
class ParentFacts:
    """The parent of the search: puzzle_parent.json."""

    name: str
    digest: str
    config: ModelConfig

    @property
    def blocks(self) -> tuple[Replacement, ...]:
        """The parent as replacements."""
        return parent_blocks(self.config)


@dataclass(frozen=True)
class Bound:
    """A constraint with its operating point and its limit in the metric's unit."""

    name: str
    constraint: Constraint
    quantity: Quantity
    parent_value: float

    @property
    def relative(self) -> bool:
        """Whether the limit is a multiple of the parent's value."""
        return self.constraint.at_most_ratio is not None or self.constraint.at_least_ratio is not None

    @property
    def limit(self) -> float:
        """The limit as the user gave it."""
        given = self.constraint
        limits = (given.at_most, given.at_least, given.at_most_ratio, given.at_least_ratio)
        return next(limit for limit in limits if limit is not None)

    @property
    def per_unit(self) -> float:
        """The metric's value that the user's number 1 stands for."""
        return self.parent_value if self.relative else 1.0

    def text(self, tightening: float) -> str:
        """The constraint in words."""
        setting = self.quantity.setting
        where = f" ({setting.text})" if setting else ""
        if self.quantity.metric == "memory_gib":
            where = f" (batch {self.quantity.batch}, context {self.quantity.context}, {self.quantity.precision})"
        sign = ">=" if self.quantity.inverse else "<="
        unit = "x the parent's" if self.relative else f" {UNITS[self.quantity.metric]}"
        margin = f" (with a margin of {abs(tightening - 1):.0%})" if tightening != 1 else ""
        return f"{self.name}: {self.quantity.metric}{where} {sign} {self.limit:g}{unit}{margin}"


@dataclass(frozen=True)
class TargetTables:
    """A target with all that its search reads: the parent's facts, scores, costs and the constraints on them."""

    target: str
    parent: ParentFacts
    scores: Scores
    costs: CostTable
    bounds: tuple[Bound, ...]
    speed_margin: float

    @classmethod
    def read(cls, target: str, params: Params, paths: Paths) -> Self:
        """Read the tables.

        Raises:
            InputError: a table is missing or wrong, or lacks a row that a constraint needs.
        """
        parent = _read_parent(paths)
        scores, costs = Scores.of(read_scores(paths.scores), parent.config), CostTable(read_costs(paths.costs))
        constraints = params.target(target).constraints
        bounds = tuple(_bound(name, constraint, costs, parent) for name, constraint in constraints.items())
        return cls(target, parent, scores, costs, bounds, params.search_architecture.speed_margin)

    def problem(self, weights: Weights) -> Problem[Replacement]:
        """All replacements with a score, the parent's own blocks (which score 0), and the limits on them."""
        replacements = sorted({*self.parent.blocks, *self.scores.replacements(weights)})
        choices = tuple(Choice(of, self.scores.score(of, weights).mean) for of in replacements)
        limits = tuple(_limit(bound, replacements, self.costs, self.speed_margin) for bound in self.bounds)
        return Problem(self.target, self.parent.config.num_blocks, choices, limits)

    def predict(self, blocks: Sequence[Replacement], weights: Weights) -> dict[str, Any]:
        """What the tables say of a child, absolute and relative to the parent."""
        score = self.scores.total(blocks, weights)
        memory = _memory_point(self.bounds, self.parent)
        child, whole = (
            model_sizes(self.costs, of, memory.precision, memory.hardware, memory.engine)
            for of in (blocks, self.parent.blocks)
        )
        assert memory.context is not None, memory
        speed = next((bound for bound in self.bounds if bound.quantity.setting), None)
        return {
            "score": score.mean,
            "score_stderr": score.stderr,
            "params": child.params,
            "params_ratio": child.params / whole.params,
            "block_params": child.block_params,
            "block_params_ratio": child.block_params / whole.block_params,
            "weight_gib": child.weight_bytes / GIB,
            "kv_bytes_per_token": child.kv_bytes_per_token,
            "kv_ratio": child.kv_bytes_per_token / whole.kv_bytes_per_token,
            "memory_gib": child.memory_gib(memory.batch, memory.context, memory.tensor_parallel),
            "batch": memory.batch,
            "context": memory.context,
            "precision": memory.precision,
            "throughput_ratio": _speed_ratio(speed, blocks, self.costs) if speed else None,
            "speed": _speed_json(speed, blocks, self.costs) if speed else None,
        }


def _read_parent(paths: Paths) -> ParentFacts:
    path = paths.parent / "puzzle_parent.json"
    found = read_json(path, "dvc repro prepare_parent")
    try:
        return ParentFacts(found["name"], found["digest"], ModelConfig.from_json(found["config"]))
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} lacks a field ({error}); run `dvc repro prepare_parent`") from error


def _bound(name: str, constraint: Constraint, table: CostTable, parent: ParentFacts) -> Bound:
    speed = constraint.metric in SPEED_METRICS
    quantity = Quantity(
        metric=constraint.metric,
        precision=constraint.precision,
        hardware=constraint.hardware,
        engine=constraint.engine if speed or constraint.hardware else None,
        scenario=constraint.scenario,
        batch=constraint.batch,
        context=constraint.context,
        tensor_parallel=constraint.tensor_parallel,
    )
    return Bound(name, constraint, quantity, measure(table, parent.blocks, quantity))


def _limit(bound: Bound, replacements: Sequence[Replacement], table: CostTable, margin: float) -> Limit:
    """A constraint as a linear limit: throughput >= X is latency <= tokens / X."""
    quantity = bound.quantity
    tightening = 1.0
    if quantity.metric in SPEED_METRICS:
        tightening = 1 + margin if quantity.inverse else 1 - margin
    return Limit(
        name=bound.name,
        text=bound.text(tightening),
        coefficients=tuple(quantity.of_block(table, replacement) for replacement in replacements),
        constant=quantity.fixed(table),
        upper=quantity.total_at(bound.limit * bound.per_unit * tightening),
        scale=quantity.scale / bound.per_unit,
        inverse=quantity.inverse,
        unit="x" if bound.relative else f" {UNITS[quantity.metric]}",
        tightening=tightening,
    )


def _memory_point(bounds: Sequence[Bound], parent: ParentFacts) -> Quantity:
    """Where memory is reported: at the memory constraint, else at the speed constraint's, else one full context."""
    quantities = [bound.quantity for bound in bounds]
    for quantity in quantities:
        if quantity.metric == "memory_gib":
            return quantity
    for quantity in quantities:
        if setting := quantity.setting:
            context = setting.input_tokens + setting.output_tokens
            return Quantity(
                "memory_gib",
                precision=setting.precision,
                hardware=setting.hardware,
                engine=setting.engine,
                batch=setting.batch,
                context=context,
                tensor_parallel=setting.tensor_parallel,
            )
    precision = quantities[0].precision
    return Quantity("memory_gib", precision=precision, context=parent.config.context)


def _speed_ratio(speed: Bound, blocks: Sequence[Replacement], table: CostTable) -> float:
    """How much faster than the parent: child / parent of a throughput, parent / child of a latency."""
    child = measure(table, blocks, speed.quantity)
    return child / speed.parent_value if speed.quantity.inverse else speed.parent_value / child


def _speed_json(speed: Bound, blocks: Sequence[Replacement], table: CostTable) -> dict[str, Any]:
    """Where `throughput_ratio` holds."""
    setting = speed.quantity.setting
    assert setting is not None, speed
    return {
        "metric": speed.quantity.metric,
        "unit": UNITS[speed.quantity.metric],
        "child": measure(table, blocks, speed.quantity),
        "parent": speed.parent_value,
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
