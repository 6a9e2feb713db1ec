"""search_architecture: scores and costs in, the best architecture that keeps a target's constraints out.

In: scores.parquet, costs.parquet, parent/puzzle_parent.json, the target's constraints in params.yaml.
Out: children/<target>/architecture.json (what was chosen and what the tables predict; no clocks in it) and search.json
(how the search went). Nothing is written when no child exists. Run: `python -m flows.search_architecture TARGET`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect import task

from storage.files import DamagedFileError, read_json, write_json
from storage.model_config import ModelConfig
from storage.params import SPEED_METRICS, Constraint, Params, SearchArchitecture, Target
from storage.paths import Paths
from storage.records import Architecture, Metric, Replacement, Weights
from storage.tables import read_costs, read_scores
from tasks.puzzle.costs import GIB, CostTable, Quantity, Setting, measure, model_sizes
from tasks.puzzle.mip import TOLERANCE, Choice, Limit, LimitUse, Problem, Settings, Solution, solve
from tasks.puzzle.score_rule import Scores
from tasks.puzzle.variants import parent_blocks

_WEIGHTS: Weights = "decoupled"
"""The training whose scores count: the child is assembled from the library's trained variants."""

_UNITS: dict[Metric, str] = {
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
class Found:
    """What a search found, for the flow's log: the score is predicted nats/token, the ratios are to the parent."""

    target: str
    score: float
    gap: float
    block_params_ratio: float
    throughput_ratio: float | None
    seconds: float


@dataclass(frozen=True)
class _Parent:
    """The parent of the search: puzzle_parent.json."""

    name: str
    digest: str
    config: ModelConfig

    @property
    def blocks(self) -> tuple[Replacement, ...]:
        """The parent as replacements."""
        return parent_blocks(self.config)


@dataclass(frozen=True)
class _Bound:
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
        unit = "x the parent's" if self.relative else f" {_UNITS[self.quantity.metric]}"
        margin = f" (with a margin of {abs(tightening - 1):.0%})" if tightening != 1 else ""
        return f"{self.name}: {self.quantity.metric}{where} {sign} {self.limit:g}{unit}{margin}"


@task
def search(target: str, params: Params, paths: Paths) -> Found:
    """Find the architecture of `target` and write architecture.json and search.json.

    Raises:
        InfeasibleError: no child keeps all constraints; nothing is written.
        InputError: a table is missing or wrong, or lacks a row that a constraint needs.
    """
    parent = _read_parent(paths)
    scores = Scores.of(read_scores(paths.scores), parent.config)
    table = CostTable(read_costs(paths.costs))
    wanted = params.target(target)
    bounds = [_bound(name, constraint, table, parent) for name, constraint in wanted.constraints.items()]
    problem = _problem(target, bounds, scores, table, parent, params.search_architecture)
    settings = Settings(
        solver=params.search_architecture.solver,
        relative_gap=params.search_architecture.relative_gap,
        node_limit=params.search_architecture.node_limit,
        seed=params.run.seed,
    )
    solution = solve(problem, settings)
    blocks = tuple(choice.replacement for choice in solution.chosen)
    _recheck(blocks, bounds, table)
    predicted = _predicted(blocks, bounds, scores, table, parent)
    write_json(paths.search(target), _search_json(solution, settings))
    write_json(paths.architecture(target), _architecture_json(target, wanted, parent, blocks, predicted, bounds, table))
    return Found(
        target,
        solution.objective,
        solution.gap,
        predicted["block_params_ratio"],
        predicted["throughput_ratio"],
        solution.seconds,
    )


def _read_parent(paths: Paths) -> _Parent:
    path = paths.parent / "puzzle_parent.json"
    found = read_json(path, "dvc repro prepare_parent")
    try:
        return _Parent(found["name"], found["digest"], ModelConfig.from_json(found["config"]))
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} lacks a field ({error}); run `dvc repro prepare_parent`") from error


def _bound(name: str, constraint: Constraint, table: CostTable, parent: _Parent) -> _Bound:
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
    return _Bound(name, constraint, quantity, measure(table, parent.blocks, quantity))


def _problem(
    target: str,
    bounds: Sequence[_Bound],
    scores: Scores,
    table: CostTable,
    parent: _Parent,
    settings: SearchArchitecture,
) -> Problem:
    """All replacements with a score, the parent's own blocks (which score 0), and the limits on them."""
    replacements = sorted({*parent.blocks, *scores.replacements(_WEIGHTS)})
    choices = tuple(Choice(of, scores.score(of, _WEIGHTS).mean) for of in replacements)
    limits = tuple(_limit(bound, replacements, table, settings.speed_margin) for bound in bounds)
    return Problem(target, parent.config.num_blocks, choices, limits)


def _limit(bound: _Bound, replacements: Sequence[Replacement], table: CostTable, margin: float) -> Limit:
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
        unit="x" if bound.relative else f" {_UNITS[quantity.metric]}",
        tightening=tightening,
    )


def _recheck(blocks: Sequence[Replacement], bounds: Sequence[_Bound], table: CostTable) -> None:
    """Compare what was chosen with every constraint, by the tables and not by the search's coefficients."""
    for bound in bounds:
        value = measure(table, blocks, bound.quantity) / bound.per_unit
        slack = value - bound.limit if bound.quantity.inverse else bound.limit - value
        assert slack >= -2 * TOLERANCE * bound.limit, (bound.name, value, bound.limit)


def _predicted(
    blocks: Sequence[Replacement], bounds: Sequence[_Bound], scores: Scores, table: CostTable, parent: _Parent
) -> dict[str, Any]:
    """What the tables say of the child, absolute and relative to the parent."""
    score = scores.total(blocks, _WEIGHTS)
    memory = _memory_point(bounds, parent)
    child, whole = (
        model_sizes(table, of, memory.precision, memory.hardware, memory.engine) for of in (blocks, parent.blocks)
    )
    assert memory.context is not None, memory
    speed = next((bound for bound in bounds if bound.quantity.setting), None)
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
        "throughput_ratio": _speed_ratio(speed, blocks, table) if speed else None,
        "speed": _speed_json(speed, blocks, table) if speed else None,
    }


def _memory_point(bounds: Sequence[_Bound], parent: _Parent) -> Quantity:
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


def _speed_ratio(speed: _Bound, blocks: Sequence[Replacement], table: CostTable) -> float:
    """How much faster than the parent: child / parent of a throughput, parent / child of a latency."""
    child = measure(table, blocks, speed.quantity)
    return child / speed.parent_value if speed.quantity.inverse else speed.parent_value / child


def _speed_json(speed: _Bound, blocks: Sequence[Replacement], table: CostTable) -> dict[str, Any]:
    """Where `throughput_ratio` holds."""
    setting = speed.quantity.setting
    assert setting is not None, speed
    return {
        "metric": speed.quantity.metric,
        "unit": _UNITS[speed.quantity.metric],
        "child": measure(table, blocks, speed.quantity),
        "parent": speed.parent_value,
        **_setting_json(setting),
        "origin": table.origin(setting),
    }


def _setting_json(setting: Setting) -> dict[str, Any]:
    return {
        "hardware": setting.hardware,
        "engine": setting.engine,
        "precision": setting.precision,
        "tensor_parallel": setting.tensor_parallel,
        "scenario": setting.scenario,
        "batch": setting.batch,
    }


def _architecture_json(
    target: str,
    wanted: Target,
    parent: _Parent,
    blocks: tuple[Replacement, ...],
    predicted: dict[str, Any],
    bounds: Sequence[_Bound],
    table: CostTable,
) -> dict[str, Any]:
    return {
        "target": target,
        "label": wanted.label,
        "parent": {"name": parent.name, "digest": parent.digest},
        "blocks": Architecture(blocks).to_json(),
        "predicted": predicted,
        "constraints": [_constraint_json(bound, blocks, table) for bound in bounds],
    }


def _constraint_json(bound: _Bound, blocks: Sequence[Replacement], table: CostTable) -> dict[str, Any]:
    setting = bound.quantity.setting
    memory = {"batch": bound.quantity.batch, "context": bound.quantity.context}
    where = _setting_json(setting) if setting else memory if bound.quantity.metric == "memory_gib" else {}
    return {
        "name": bound.name,
        "metric": bound.quantity.metric,
        "kind": "at_least" if bound.quantity.inverse else "at_most",
        "limit": bound.limit,
        "predicted": measure(table, blocks, bound.quantity) / bound.per_unit,
        "unit": "x the parent's" if bound.relative else _UNITS[bound.quantity.metric],
        **where,
    }


def _search_json(solution: Solution, settings: Settings) -> dict[str, Any]:
    return {
        "solver": settings.solver,
        "status": solution.status,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "nodes": solution.nodes,
        "node_limit": settings.node_limit,
        "binding": [use.name for use in solution.uses if use.binds],
        "limits": [_use_json(use) for use in solution.uses],
    }


def _use_json(use: LimitUse) -> dict[str, Any]:
    return {
        "name": use.name,
        "allowed": use.allowed,
        "reached": use.reached,
        "slack": use.slack,
        "price_nats_per_100_percent": use.price,
    }
