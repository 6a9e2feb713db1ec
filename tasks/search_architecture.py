"""search_architecture: the best architecture that keeps a target's constraints, from scores and costs.

In: scores.parquet, costs.parquet, parent/puzzle_parent.json, the target's constraints in params.yaml.
Out: children/<target>/architecture.json (what was chosen and what the tables predict; no clocks in it) and search.json
(how the search went). A target with `chosen_by` gets the child of a baseline in the same form. Nothing is written when
no child exists. Run:
`puzzle stage search_architecture --target TARGET`, or `puzzle search` on tables of one's own.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import task

from storage.architecture import ChosenArchitecture, ParentIdentity, write_architecture
from storage.files import write_sealed
from storage.json_files import read_object
from storage.model_config import ModelConfig
from storage.params import Params, load_target
from storage.paths import Paths
from storage.records import ChosenBy
from storage.sections import SearchArchitecture
from storage.tables import read_costs, read_scores
from storage.variants import Architecture, Replacement
from tasks.puzzle.search.mip import SOLVER_NAME, LimitUse, SolverSettings
from tasks.puzzle.search.operating_points import OperatingPoint
from tasks.puzzle.search.problem import TOLERANCE
from tasks.targets.parent_facts import ParentFacts
from tasks.targets.simple_choices import Child, simple_choice
from tasks.targets.target_tables import WEIGHTS, SearchedChild, TargetTables, solver_settings


@dataclass(frozen=True)
class SearchSummary:
    """The result of a search, for the flow's log.

    Attributes:
        target: key in params.yaml.
        chosen_by: `search`, or the baseline that the target asks for.
        score: predicted nats/token.
        gap: the score's distance from its proven bound, as a share; None where a baseline chose.
        block_params_ratio: the child's parameters in blocks over the parent's.
        throughput_ratio: the child's speed as a multiple of the parent's; None for a target without a limit on a speed.
        seconds: duration of the search.
    """

    target: str
    chosen_by: ChosenBy
    score: float
    gap: float | None
    block_params_ratio: float
    throughput_ratio: float | None
    seconds: float


@task
def search(target: str, params: Params, paths: Paths) -> SearchSummary:
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


def search_own(files: OwnTables, section: SearchArchitecture, out: Path) -> SearchSummary:
    """Search as `search` does, from a user's files alone; write architecture.json and search.json to `out`.

    Raises:
        InfeasibleError: no child keeps all constraints; nothing is written.
        InputError: a file is missing or wrong, or lacks a row that a constraint needs.
    """
    scores, costs = read_scores(files.scores, takes_foreign=True), read_costs(files.costs, takes_foreign=True)
    config = None
    if files.parent is not None:
        config = ModelConfig.from_hf(read_object(files.parent, "the download"), str(files.parent))
    parent, target = ParentFacts.from_tables(scores, costs, config), load_target(files.target)
    tables = TargetTables.from_rows(files.target.stem, target, parent, scores, costs, section.speed_margin)
    return _search(tables, section, 0, out)


def _search(tables: TargetTables, section: SearchArchitecture, seed: int, out: Path) -> SearchSummary:
    began = time.perf_counter()
    if tables.target.chosen_by == "search":
        (blocks, point), how = _searched(tables, solver_settings(section, seed), section)
    else:
        blocks, point = simple_choice(tables, tables.target.chosen_by)
        how = _simple_json(blocks, point, tables)
    _check_limits(blocks, point, tables)
    tables.allowed.check_child(blocks)
    chosen = _chosen_architecture(tables, blocks, point)
    write_sealed(out / "search.json", {"chosen_by": chosen.chosen_by, **how})
    write_architecture(out / "architecture.json", chosen)
    return SearchSummary(
        tables.target_name,
        chosen.chosen_by,
        how["objective"],
        how.get("gap"),
        chosen.predicted.block_params_ratio,
        chosen.predicted.throughput_ratio,
        time.perf_counter() - began,
    )


def _searched(
    tables: TargetTables, settings: SolverSettings, section: SearchArchitecture
) -> tuple[Child, dict[str, Any]]:
    """Search the best child, and return it with the content of search.json: how the search went, further children."""
    child = tables.search(WEIGHTS, settings)
    alternatives = [
        _alternative_json(other, child, tables)
        for other in tables.alternatives(child, WEIGHTS, settings, section.alternatives, section.min_distance)
    ]
    return (child.blocks, child.point), {**_search_json(child, settings), "alternatives": alternatives}


def _simple_json(blocks: Sequence[Replacement], point: OperatingPoint, tables: TargetTables) -> dict[str, Any]:
    """Return the content of search.json where a baseline chose: its score, and how far it is from each limit."""
    limits = []
    for bound in tables.limits.bounds(point):
        reached = bound.value(tables.costs, blocks)
        slack = reached - bound.limit if bound.lower else bound.limit - reached
        limits.append({"name": bound.name, "allowed": bound.limit, "reached": reached, "slack": slack})
    return {"objective": tables.scores.total(blocks, WEIGHTS).mean, "limits": limits}


def _check_limits(blocks: Sequence[Replacement], point: OperatingPoint, tables: TargetTables) -> None:
    """Compare the chosen child with every limit, by the tables and not by the search's coefficients."""
    for bound in tables.limits.bounds(point):
        value = bound.value(tables.costs, blocks)
        slack = value - bound.limit if bound.lower else bound.limit - value
        assert slack >= -2 * TOLERANCE * bound.limit, (bound.name, value, bound.limit)


def _chosen_architecture(
    tables: TargetTables, blocks: tuple[Replacement, ...], point: OperatingPoint
) -> ChosenArchitecture:
    return ChosenArchitecture(
        target=tables.target_name,
        label=tables.target.label,
        parent=ParentIdentity(tables.parent.name, tables.parent.digest),
        blocks=blocks,
        operating_points=point.settings,
        predicted=tables.predict(blocks, WEIGHTS, point),
        constraints=tables.reached_limits(blocks, point),
        chosen_by=tables.target.chosen_by,
    )


def _alternative_json(alternative: SearchedChild, child: SearchedChild, tables: TargetTables) -> dict[str, Any]:
    """Return a further child's entry; `tie`: its score is worse by less than the standard error of the difference."""
    difference = tables.scores.difference(alternative.blocks, child.blocks, WEIGHTS)
    shared = {*child.blocks} & {*alternative.blocks}
    solution = alternative.best.solution
    return {
        "score": solution.objective,
        "score_difference": difference.mean,
        "score_difference_stderr": difference.stderr,
        "tie": difference.stderr is not None and difference.mean < difference.stderr,
        "bound": solution.bound,
        "gap": solution.gap,
        "status": solution.status,
        "distance": 1 - sum(block.span for block in shared) / len(tables.parent.blocks),
        "operating_points": [asdict(setting) for setting in alternative.point.settings],
        "blocks": Architecture(alternative.blocks).to_json(),
    }


def _search_json(child: SearchedChild, settings: SolverSettings) -> dict[str, Any]:
    """Return the content of search.json: solver, score and bound, the limits in use, the operating points tried."""
    solution = child.best.solution
    return {
        "solver": SOLVER_NAME,
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
