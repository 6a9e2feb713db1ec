"""search_architecture: scores and costs in, the best architecture that keeps a target's constraints out.

In: scores.parquet, costs.parquet, parent/puzzle_parent.json, the target's constraints in params.yaml.
Out: children/<target>/architecture.json (what was chosen and what the tables predict; no clocks in it) and search.json
(how the search went). Nothing is written when no child exists. Run: `python -m flows.search_architecture TARGET`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import task

from storage.files import read_json, write_json
from storage.model_config import ModelConfig
from storage.params import Params, load_target
from storage.paths import Paths
from storage.records import Architecture
from storage.sections import SearchArchitecture
from storage.tables import read_costs, read_scores
from tasks.limits import WEIGHTS, Child, ParentFacts, TargetTables, solver_settings
from tasks.puzzle.bounds import setting_json
from tasks.puzzle.mip import LimitUse, Settings
from tasks.puzzle.problem import TOLERANCE


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
    return _search(tables, params.search_architecture, params.run.seed, paths.child(target))


@dataclass(frozen=True)
class OwnTables:
    """A user's files: scores and costs (Parquet), the target (YAML, as in params.yaml), the parent's config.json."""

    scores: Path
    costs: Path
    target: Path
    parent: Path | None


def search_own(tables: OwnTables, section: SearchArchitecture, out: Path) -> Found:
    """The same search from a user's files alone; architecture.json and search.json go to `out`.

    Raises:
        InfeasibleError: no child keeps all constraints; nothing is written.
        InputError: a file is missing or wrong, or lacks a row that a constraint needs.
    """
    scores, costs = read_scores(tables.scores), read_costs(tables.costs)
    config = None
    if tables.parent is not None:
        config = ModelConfig.from_hf(read_json(tables.parent, "the download"), str(tables.parent))
    parent, wanted = ParentFacts.of_tables(scores, costs, config), load_target(tables.target)
    own = TargetTables.of(tables.target.stem, wanted, parent, scores, costs, section.speed_margin)
    return _search(own, section, 0, out)


def _search(tables: TargetTables, section: SearchArchitecture, seed: int, out: Path) -> Found:
    settings = solver_settings(section, seed)
    child = tables.search(WEIGHTS, settings)
    _recheck(child, tables)
    tables.check_runtimes(child.blocks)
    others = list(tables.alternatives(child, WEIGHTS, settings, section.alternatives, section.min_distance))
    predicted = tables.predict(child.blocks, WEIGHTS, child.point)
    alternatives = [_alternative_json(other, child, tables) for other in others]
    write_json(out / "search.json", {**_search_json(child, settings), "alternatives": alternatives})
    write_json(out / "architecture.json", _architecture_json(tables, child, predicted))
    solution = child.best.solution
    return Found(
        tables.target,
        solution.objective,
        solution.gap,
        predicted["block_params_ratio"],
        predicted["throughput_ratio"],
        solution.seconds,
    )


def _alternative_json(other: Child, child: Child, tables: TargetTables) -> dict[str, Any]:
    """A further child; `tie`: its score is worse by less than the standard error of the difference."""
    more = tables.scores.difference(other.blocks, child.blocks, WEIGHTS)
    kept = {*child.blocks} & {*other.blocks}
    return {
        "score": other.best.solution.objective,
        "score_difference": more.mean,
        "score_difference_stderr": more.stderr,
        "tie": more.stderr is not None and more.mean < more.stderr,
        "bound": other.best.solution.bound,
        "gap": other.best.solution.gap,
        "status": other.best.solution.status,
        "distance": 1 - sum(of.span for of in kept) / len(tables.parent.blocks),
        "operating_points": [setting_json(other.point.setting(place)) for place in other.point.operations],
        "blocks": Architecture(other.blocks).to_json(),
    }


def _recheck(child: Child, tables: TargetTables) -> None:
    """Compare what was chosen with every limit, by the tables and not by the search's coefficients."""
    for bound in tables.bounds(child.point):
        value = bound.measured(tables.costs, child.blocks)
        slack = value - bound.limit if bound.lower else bound.limit - value
        assert slack >= -2 * TOLERANCE * bound.limit, (bound.name, value, bound.limit)


def _architecture_json(tables: TargetTables, child: Child, predicted: dict[str, Any]) -> dict[str, Any]:
    return {
        "target": tables.target,
        "label": tables.wanted.label,
        "parent": {"name": tables.parent.name, "digest": tables.parent.digest},
        "blocks": Architecture(child.blocks).to_json(),
        "operating_points": [setting_json(child.point.setting(place)) for place in child.point.operations],
        "predicted": predicted,
        "constraints": tables.constraints_json(child.blocks, child.point),
    }


def _search_json(child: Child, settings: Settings) -> dict[str, Any]:
    solution = child.best.solution
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
        "operating_points": [asdict(tried) for tried in child.best.tried],
    }


def _use_json(use: LimitUse) -> dict[str, Any]:
    return {
        "name": use.name,
        "allowed": use.allowed,
        "reached": use.reached,
        "slack": use.slack,
        "price_nats_per_100_percent": use.price,
    }
