"""search_architecture: scores and costs in, the best architecture that keeps a target's constraints out.

In: scores.parquet, costs.parquet, parent/puzzle_parent.json, the target's constraints in params.yaml.
Out: children/<target>/architecture.json (what was chosen and what the tables predict; no clocks in it) and search.json
(how the search went). Nothing is written when no child exists. Run: `python -m flows.search_architecture TARGET`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect import task

from storage.files import write_json
from storage.params import Params
from storage.paths import Paths
from storage.records import Architecture, Replacement, Weights
from tasks.limits import UNITS, Bound, TargetTables, setting_json
from tasks.puzzle.costs import CostTable, measure
from tasks.puzzle.mip import LimitUse, Settings, Solution
from tasks.puzzle.problem import TOLERANCE
from tasks.puzzle.search import best_child

WEIGHTS: Weights = "decoupled"
"""The training whose scores count: the child is assembled from the library's trained variants."""


@dataclass(frozen=True)
class Found:
    """What a search found, for the flow's log: the score is predicted nats/token, the ratios are to the parent."""

    target: str
    score: float
    gap: float
    block_params_ratio: float
    throughput_ratio: float | None
    seconds: float


@task
def search(target: str, params: Params, paths: Paths) -> Found:
    """Find the architecture of `target` and write architecture.json and search.json.

    Raises:
        InfeasibleError: no child keeps all constraints; nothing is written.
        InputError: a table is missing or wrong, or lacks a row that a constraint needs.
    """
    tables = TargetTables.read(target, params, paths)
    settings = Settings(
        solver=params.search_architecture.solver,
        relative_gap=params.search_architecture.relative_gap,
        node_limit=params.search_architecture.node_limit,
        seed=params.run.seed,
    )
    solution = best_child(tables.problem(WEIGHTS), settings).solution
    blocks = tuple(choice.replacement for choice in solution.chosen)
    _recheck(blocks, tables)
    predicted = tables.predict(blocks, WEIGHTS)
    write_json(paths.search(target), _search_json(solution, settings))
    write_json(paths.architecture(target), _architecture_json(tables, params.target(target).label, blocks, predicted))
    return Found(
        target,
        solution.objective,
        solution.gap,
        predicted["block_params_ratio"],
        predicted["throughput_ratio"],
        solution.seconds,
    )


def _recheck(blocks: Sequence[Replacement], tables: TargetTables) -> None:
    """Compare what was chosen with every constraint, by the tables and not by the search's coefficients."""
    for bound in tables.bounds:
        value = measure(tables.costs, blocks, bound.quantity) / bound.per_unit
        slack = value - bound.limit if bound.quantity.inverse else bound.limit - value
        assert slack >= -2 * TOLERANCE * bound.limit, (bound.name, value, bound.limit)


def _architecture_json(
    tables: TargetTables, label: str, blocks: tuple[Replacement, ...], predicted: dict[str, Any]
) -> dict[str, Any]:
    return {
        "target": tables.target,
        "label": label,
        "parent": {"name": tables.parent.name, "digest": tables.parent.digest},
        "blocks": Architecture(blocks).to_json(),
        "predicted": predicted,
        "constraints": [_constraint_json(bound, blocks, tables.costs) for bound in tables.bounds],
    }


def _constraint_json(bound: Bound, blocks: Sequence[Replacement], table: CostTable) -> dict[str, Any]:
    setting = bound.quantity.setting
    memory = {"batch": bound.quantity.batch, "context": bound.quantity.context}
    where = setting_json(setting) if setting else memory if bound.quantity.metric == "memory_gib" else {}
    return {
        "name": bound.name,
        "metric": bound.quantity.metric,
        "kind": "at_least" if bound.quantity.inverse else "at_most",
        "limit": bound.limit,
        "predicted": measure(table, blocks, bound.quantity) / bound.per_unit,
        "unit": "x the parent's" if bound.relative else UNITS[bound.quantity.metric],
        **where,
    }


def _search_json(solution: Solution[Replacement], settings: Settings) -> dict[str, Any]:
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
