"""search_baselines: what simpler searches choose under a target's constraints -> children/<target>/baselines.json.

Every baseline keeps the limits that the target's own search keeps, at the operating point that suits it best;
evaluate_child assembles and measures them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from prefect import task

from storage.files import write_json
from storage.params import Params
from storage.paths import Paths
from storage.records import Architecture, Replacement, Weights
from tasks.limits import TargetTables, solver_settings
from tasks.puzzle.baselines import depth, greedy, uniform, with_random_scores
from tasks.puzzle.infeasible import InfeasibleError
from tasks.puzzle.mip import Settings
from tasks.puzzle.operating_points import OperatingPoint
from tasks.puzzle.problem import Choice, Problem
from tasks.puzzle.search import best_child

Baseline = Callable[[Problem[Replacement], Sequence[Replacement]], tuple[Choice[Replacement], ...]]
Chosen = tuple[tuple[Replacement, ...], OperatingPoint]
_SIMPLE: dict[str, Baseline] = {"uniform": uniform, "greedy": greedy, "depth": depth}


@task
def search_baselines(target: str, params: Params, paths: Paths) -> None:
    """Choose the blocks of every baseline; one that cannot keep the limits says so.

    Raises:
        InputError: a table is missing or wrong, or lacks a row that a constraint needs.
    """
    tables, settings = (
        TargetTables.read(target, params, paths),
        solver_settings(params.search_architecture, params.run.seed),
    )
    found = {name: _row(tables, "decoupled", partial(_simple, tables, of)) for name, of in _SIMPLE.items()}
    found["untrained"] = _row(tables, "initial", partial(_untrained, tables, settings))
    for seed in range(params.search_baselines.random_seeds):
        found[f"random_{seed}"] = _row(tables, "decoupled", partial(_random, tables, settings, seed))
    write_json(paths.baselines(target), {"target": target, "baselines": found})


def _untrained(tables: TargetTables, settings: Settings) -> Chosen:
    """The same search over the variants before BLD."""
    child = tables.search("initial", settings)
    return child.blocks, child.point


def _random(tables: TargetTables, settings: Settings, seed: int) -> Chosen:
    """The same search with scores that mean nothing."""
    problem, points = tables.problem("decoupled")
    best = best_child(with_random_scores(problem, tables.parent.blocks, seed), settings, points)
    return tuple(choice.replacement for choice in best.solution.chosen), tables.points[best.point]


def _simple(tables: TargetTables, baseline: Baseline) -> Chosen:
    """A baseline's choice at the operating point where its sum of scores is least.

    Raises:
        InfeasibleError: it keeps the limits at no point.
    """
    problem, points = tables.problem("decoupled")
    children, error = [], None
    for number, point in enumerate(points):
        try:
            chosen = baseline(replace(problem, limits=(*problem.limits, *point.limits)), tables.parent.blocks)
        except InfeasibleError as found:
            error = found
            continue
        children.append((sum(choice.score for choice in chosen), number, chosen))
    if not children:
        assert error is not None
        raise error
    _, number, chosen = min(children, key=lambda child: child[:2])
    return tuple(choice.replacement for choice in chosen), tables.points[number]


def _row(tables: TargetTables, weights: Weights, choose: Callable[[], Chosen]) -> dict[str, Any]:
    try:
        blocks, point = choose()
    except InfeasibleError as error:
        return {"weights": weights, "infeasible": str(error)}
    return {
        "weights": weights,
        "blocks": Architecture(blocks).to_json(),
        "predicted": tables.predict(blocks, weights, point),
    }
