"""Why a block is what it is: every replacement that it could have, in score and time, and the best child that has it.

In: the tables that the search read, and the target's architecture.json. Out: rows for flows/commands/explain.py.
"""

from dataclasses import dataclass

from storage.architecture import read_architecture
from storage.files import InputError
from storage.params import Params
from storage.paths import Paths
from storage.variants import Replacement
from tasks.puzzle.search.best_child import best_child_if_any
from tasks.targets.target_tables import WEIGHTS, TargetTables, solver_settings


@dataclass(frozen=True)
class Option:
    """A replacement that the block could have: its own score and costs, and the best child's score that has it.

    `child_score` is None where no child with it keeps the limits. Scores in nats/token; `costs` follows Explanation's
    limits: the summand of the replacement in each limit's sum (milliseconds, bytes, parameters).
    """

    replacement: Replacement
    score: float
    score_stderr: float | None
    costs: tuple[float, ...]
    child_score: float | None
    is_chosen: bool


@dataclass(frozen=True)
class Explanation:
    """All options of one block, the chosen one first, then by the score of the best child that has it."""

    target: str
    block: int
    limits: tuple[str, ...]
    options: tuple[Option, ...]


def explain(target: str, block: int, params: Params, paths: Paths) -> Explanation:
    """Find the chosen replacement of a block, the others that it could have, and the best child that has each of them.

    Args:
        target: key in params.yaml.
        block: index of a parent block.
        params: settings of the solver, and the targets.
        paths: the paths of the tables and of the target's architecture.

    Raises:
        InputError: a table or the architecture is missing, no such block, or the architecture is not of these tables.
    """
    tables = TargetTables.read(target, params, paths)
    settings = solver_settings(params.search_architecture, params.run.seed)
    last = len(tables.parent.blocks) - 1
    if not 0 <= block <= last:
        raise InputError(f"{tables.parent.name} has blocks 0 to {last}, not {block}")
    architecture = read_architecture(target, paths)
    chosen = next(replacement for replacement in architecture.blocks if block in replacement.parent_blocks)
    problem, points = tables.problem(WEIGHTS)
    covering = [index for index, choice in enumerate(problem.choices) if block in choice.replacement.parent_blocks]
    replacements = [problem.choices[index].replacement for index in covering]
    if chosen not in replacements:
        raise InputError(
            f"{paths.architecture(target)} has {chosen.name}, which the tables or the target no longer allow; run "
            f"`dvc repro search_architecture@{target}`"
        )
    bounds = tables.limits.bounds(tables.limits.point_with(architecture.operating_points))
    columns = [bound.quantity.parts_of_blocks(tables.costs, replacements) for bound in bounds]
    others = sorted({*range(len(problem.choices))} - {*covering})
    options = []
    for row, (index, replacement) in enumerate(zip(covering, replacements, strict=True)):
        indices = sorted([*others, index])
        points_of_option = [point.restricted_to(indices) for point in points]
        best = best_child_if_any(problem.restricted_to(indices), settings, points_of_option)
        score = tables.scores.score(replacement, WEIGHTS)
        options.append(
            Option(
                replacement=replacement,
                score=score.mean,
                score_stderr=score.stderr,
                costs=tuple(column[row] for column in columns),
                child_score=None if best is None else best.solution.objective,
                is_chosen=replacement == chosen,
            )
        )
    options.sort(key=_rank)
    limits = tuple(f"{bound.name} [{bound.quantity.metric.part_unit}]" for bound in bounds)
    return Explanation(target, block, limits, tuple(options))


def _rank(option: Option) -> tuple[bool, bool, float, float]:
    """Rank the chosen one first, then by the score of the best child; options without a child last."""
    return not option.is_chosen, option.child_score is None, option.child_score or 0.0, option.score
