"""search_baselines: what simpler searches choose under a target's constraints -> children/<target>/baselines.json.

Every baseline keeps the limits that the target's own search keeps; evaluate_child assembles and measures them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from prefect import task

from storage.files import write_json
from storage.params import Params
from storage.paths import Paths
from storage.records import Architecture, Replacement, Weights
from tasks.limits import TargetTables
from tasks.puzzle.baselines import depth, greedy, uniform, with_random_scores
from tasks.puzzle.infeasible import InfeasibleError
from tasks.puzzle.mip import Settings
from tasks.puzzle.problem import Choice, Problem
from tasks.puzzle.search import best_child

Chosen = tuple[Choice[Replacement], ...]


@task
def search_baselines(target: str, params: Params, paths: Paths) -> None:
    """Choose the blocks of every baseline; one that cannot keep the limits says so.

    Raises:
        InputError: a table is missing or wrong, or lacks a row that a constraint needs.
    """
    tables, settings = TargetTables.read(target, params, paths), params.search_architecture
    solver = Settings(settings.solver, settings.relative_gap, settings.node_limit, params.run.seed)
    trained, untrained, parent = tables.problem("decoupled"), tables.problem("initial"), tables.parent.blocks
    found = {
        "uniform": _row(tables, "decoupled", partial(uniform, trained, parent)),
        "greedy": _row(tables, "decoupled", partial(greedy, trained, parent)),
        "untrained": _row(tables, "initial", partial(_solved, untrained, solver)),
        "depth": _row(tables, "decoupled", partial(depth, trained, parent)),
    }
    for seed in range(params.search_baselines.random_seeds):
        drawn = with_random_scores(trained, parent, seed)
        found[f"random_{seed}"] = _row(tables, "decoupled", partial(_solved, drawn, solver))
    write_json(paths.baselines(target), {"target": target, "baselines": found})


def _solved(problem: Problem[Replacement], settings: Settings) -> Chosen:
    return best_child(problem, settings).solution.chosen


def _row(tables: TargetTables, weights: Weights, choose: Callable[[], Chosen]) -> dict[str, Any]:
    try:
        blocks = tuple(choice.replacement for choice in choose())
    except InfeasibleError as error:
        return {"weights": weights, "infeasible": str(error)}
    return {
        "weights": weights,
        "blocks": Architecture(blocks).to_json(),
        "predicted": tables.predict(blocks, weights),
    }
