"""search_baselines: the choices of simpler searches under a target's constraints -> children/<target>/baselines.json.

Every baseline keeps the limits that the target's own search keeps, at the operating point that suits it best;
evaluate_child assembles and measures them as they are, without correction or distillation. To heal one as the target's
child is healed, give a target of the same limits `chosen_by`. `untrained` needs scores of initial weights
(score_blocks.initial_tokens). Run: `puzzle stage search_baselines --target TARGET`.
"""

from collections.abc import Callable
from functools import partial

from prefect import task

from storage.architecture import Baseline, Baselines, write_baselines
from storage.params import Params
from storage.paths import Paths
from storage.records import Weights
from tasks.puzzle.search.baselines import with_random_scores
from tasks.puzzle.search.best_child import best_child
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.mip import SolverSettings
from tasks.targets.simple_choices import Child, simple_choice, simple_searches
from tasks.targets.target_tables import TargetTables, solver_settings


@task
def search_baselines(target: str, params: Params, paths: Paths) -> None:
    """Choose the blocks of every baseline; one that cannot keep the limits says so.

    Raises:
        InputError: a table is missing or wrong, or lacks a row that a constraint needs.
    """
    tables = TargetTables.read(target, params, paths)
    settings = solver_settings(params.search_architecture, params.run.seed)
    baselines: dict[str, Baseline] = {}
    for name in simple_searches(tables):
        baselines[name] = _baseline(tables, "decoupled", partial(simple_choice, tables, name))
    if params.score_blocks.initial_tokens:
        baselines["untrained"] = _baseline(tables, "initial", partial(_untrained, tables, settings))
    for seed in range(params.search_baselines.random_seeds):
        baselines[f"random_{seed}"] = _baseline(tables, "decoupled", partial(_random, tables, settings, seed))
    write_baselines(paths.baselines(target), Baselines(target, baselines))


def _untrained(tables: TargetTables, settings: SolverSettings) -> Child:
    """Search over the variants before BLD, all scored on the same sequences."""
    child = tables.search("initial", settings)
    return child.blocks, child.point


def _random(tables: TargetTables, settings: SolverSettings, seed: int) -> Child:
    """Search with random scores, which mean nothing."""
    problem, points = tables.problem("decoupled")
    best = best_child(with_random_scores(problem, tables.parent.blocks, seed), settings, points)
    return tuple(choice.replacement for choice in best.solution.chosen), tables.limits.points[best.point_index]


def _baseline(tables: TargetTables, weights: Weights, choose: Callable[[], Child]) -> Baseline:
    try:
        blocks, point = choose()
    except InfeasibleError as error:
        return Baseline(weights, infeasible=str(error))
    return Baseline(weights, blocks=blocks, predicted=tables.predict(blocks, weights, point))
