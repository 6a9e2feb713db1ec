"""Why a block is what it is: each variant that it could have, in score and time, and the best child that has it.

In: the tables that the search read, and the target's architecture.json. Out: rows for flows/explain.py.
"""

from dataclasses import dataclass

from storage.files import InputError, read_json
from storage.params import Params
from storage.paths import Paths
from storage.records import Architecture, Metric, Replacement
from tasks.limits import WEIGHTS, TargetTables, solver_settings
from tasks.puzzle.search import best_child_if_any


@dataclass(frozen=True)
class Option:
    """A replacement that the block could have: its own score and costs, and the best child's score that has it.

    `child_score` is None where no child with it keeps the limits. Scores in nats/token; `costs` follows Explanation's
    metrics, each the share of the limit's sum (milliseconds, bytes, parameters) that the replacement takes.
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
    """What the block is, what else it could be, and what that would have cost.

    Args:
        target: key in params.yaml.
        block: index of a parent block.
        params: for the solver, and the target.
        paths: of the tables and the target's architecture.

    Raises:
        InputError: a table or the architecture is missing, no such block, or the architecture is not of these tables.
    """
    tables = TargetTables.read(target, params, paths)
    settings = solver_settings(params.search_architecture, params.run.seed)
    last = len(tables.parent.blocks) - 1
    if not 0 <= block <= last:
        raise InputError(f"{tables.parent.name} has blocks 0 to {last}, not {block}")
    found = read_json(paths.architecture(target), f"dvc repro search_architecture@{target}")
    chosen = next(of for of in Architecture.from_json(found["blocks"]).blocks if block in of.parent_blocks)
    problem, points = tables.problem(WEIGHTS)
    here = [number for number, choice in enumerate(problem.choices) if block in choice.replacement.parent_blocks]
    replacements = [problem.choices[number].replacement for number in here]
    if chosen not in replacements:
        raise InputError(
            f"{paths.architecture(target)} has {chosen.name}, which the tables or the target no longer allow; run "
            f"`dvc repro search_architecture@{target}`"
        )
    bounds = tables.bounds(tables.point_of(found["operating_points"]))
    columns = [bound.quantity.of_blocks(tables.costs, replacements) for bound in bounds]
    elsewhere = sorted({*range(len(problem.choices))} - {*here})
    options = []
    for row, (number, of) in enumerate(zip(here, replacements, strict=True)):
        kept = sorted([*elsewhere, number])
        best = best_child_if_any(problem.only(kept), settings, [point.only(kept) for point in points])
        score = tables.scores.score(of, WEIGHTS)
        options.append(
            Option(
                replacement=of,
                score=score.mean,
                score_stderr=score.stderr,
                costs=tuple(column[row] for column in columns),
                child_score=None if best is None else best.solution.objective,
                is_chosen=of == chosen,
            )
        )
    options.sort(key=lambda one: (not one.is_chosen, one.child_score is None, one.child_score or 0.0, one.score))
    columns_text = tuple(f"{bound.name} [{_PARTS.get(bound.quantity.metric, 'ms')}]" for bound in bounds)
    return Explanation(target, block, columns_text, tuple(options))


_PARTS: dict[Metric, str] = {
    "params": "parameters",
    "block_params": "parameters",
    "attention_blocks": "blocks",
    "weight_bytes": "bytes",
    "kv_bytes": "bytes/token",
    "memory_gib": "bytes",
    "throughput": "ms/request",
    "decode_throughput": "ms/request",
}
"""Unit of what a replacement adds to a metric's sum; latencies add up milliseconds."""
