"""search_baselines: the choices of simpler searches under a target's constraints -> children/<target>/baselines.json.

Every baseline keeps the limits that the target's own search keeps, at the operating point that suits it best;
evaluate_child assembles and measures them. Run: `puzzle stage search_baselines --target TARGET`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from prefect import task

from storage.architecture import Baseline, Baselines, write_baselines
from storage.params import Params
from storage.paths import Paths
from storage.records import Weights
from storage.variants import Replacement
from tasks.puzzle.search.baselines import depth, greedy, uniform, with_random_scores
from tasks.puzzle.search.best_child import best_child
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.mip import SolverSettings
from tasks.puzzle.search.operating_points import OperatingPoint
from tasks.puzzle.search.problem import Choice, Problem
from tasks.targets.target_tables import TargetTables, solver_settings

SimpleSearch = Callable[[Problem[Replacement], Sequence[Replacement]], tuple[Choice[Replacement], ...]]
Child = tuple[tuple[Replacement, ...], OperatingPoint]
"""Blocks, and the operating point where they were chosen."""
_SIMPLE: dict[str, SimpleSearch] = {"uniform": uniform, "greedy": greedy, "depth": depth}


@task
def search_baselines(target: str, params: Params, paths: Paths) -> None:
    """Choose the blocks of every baseline; one that cannot keep the limits says so.

    Raises:
        InputError: a table is missing or wrong, or lacks a row that a constraint needs.
    """
    tables = TargetTables.read(target, params, paths)
    settings = solver_settings(params.search_architecture, params.run.seed)
    baselines = {name: _baseline(tables, "decoupled", partial(_simple, tables, _SIMPLE[name])) for name in _SIMPLE}
    baselines["untrained"] = _baseline(tables, "initial", partial(_untrained, tables, settings))
    for seed in range(params.search_baselines.random_seeds):
        baselines[f"random_{seed}"] = _baseline(tables, "decoupled", partial(_random, tables, settings, seed))
    write_baselines(paths.baselines(target), Baselines(target, baselines))


def _untrained(tables: TargetTables, settings: SolverSettings) -> Child:
    """The target's search over the variants before BLD."""
    child = tables.search("initial", settings)
    return child.blocks, child.point


def _random(tables: TargetTables, settings: SolverSettings, seed: int) -> Child:
    """The target's search with random scores, which mean nothing."""
    problem, points = tables.problem("decoupled")
    best = best_child(with_random_scores(problem, tables.parent.blocks, seed), settings, points)
    return tuple(choice.replacement for choice in best.solution.chosen), tables.limits.points[best.point_index]


def _simple(tables: TargetTables, simple_search: SimpleSearch) -> Child:
    """The choice of a simple search at the operating point where its sum of scores is least.

    Raises:
        InfeasibleError: it keeps the limits at no point.
    """
    problem, points = tables.problem("decoupled")
    children, last_error = [], None
    for index, point in enumerate(points):
        try:
            chosen = simple_search(replace(problem, limits=(*problem.limits, *point.limits)), tables.parent.blocks)
        except InfeasibleError as error:
            last_error = error
            continue
        children.append((sum(choice.score for choice in chosen), index, chosen))
    if not children:
        assert last_error is not None
        raise last_error
    _, index, chosen = min(children, key=lambda child: child[:2])
    return tuple(choice.replacement for choice in chosen), tables.limits.points[index]


def _baseline(tables: TargetTables, weights: Weights, choose: Callable[[], Child]) -> Baseline:
    try:
        blocks, point = choose()
    except InfeasibleError as error:
        return Baseline(weights, infeasible=str(error))
    return Baseline(weights, blocks=blocks, predicted=tables.predict(blocks, weights, point))
