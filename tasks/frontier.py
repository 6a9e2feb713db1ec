"""The frontier of one target: predicted quality against the metric of one of its constraints -> Parquet and a figure.

In: the tables that the search reads. Out: artifacts/frontier/<target>.parquet, .svg and .png, which no stage reads.
Run: `python -m flows.frontier --target like-51b --over decode`.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from storage.files import InputError, read_json, write_whole
from storage.params import Params
from storage.paths import Paths
from storage.records import Architecture, Replacement
from tasks.drawing.frontier import Marked, Proven, draw_frontier
from tasks.limits import WEIGHTS, TargetTables, solver_settings
from tasks.puzzle.bounds import UNITS, Bound
from tasks.puzzle.frontier import FrontierPoint, sweep, undominated
from tasks.puzzle.mip import Settings, minimise
from tasks.puzzle.problem import Problem
from tasks.puzzle.search import Point

_GAP = 1e-4


@dataclass(frozen=True)
class Frontier:
    """What was found: how many values were tried, the undominated children as rows, and where they were written."""

    tried: int
    rows: tuple[dict[str, Any], ...]
    axis: str
    files: tuple[str, ...]


def frontier(
    target: str, over: str, keep: Sequence[str], to: float | None, count: int, params: Params, paths: Paths
) -> Frontier:
    """Sweep the constraint `over` of a target from the parent's value to `to`, or the best that any child reaches.

    Args:
        target: whose pins, kinds, runtimes and operating points hold.
        over: name of the constraint whose limit is swept; its margin is left off.
        keep: names of constraints that hold as well.
        to: the value to end at, in the constraint's unit; None is twice as good as the target asks for.
        count: values to try, evenly spaced as ratios.
        params: for the solver, and the target.
        paths: of the tables.

    Raises:
        InputError: a table is missing or wrong, or a name is no constraint of the target.
    """
    tables = _only(replace(TargetTables.read(target, params, paths), speed_margin=0.0), [over, *keep])
    settings = replace(
        solver_settings(params.search_architecture, params.run.seed),
        relative_gap=max(_GAP, params.search_architecture.relative_gap),
    )
    problem, points = tables.problem(WEIGHTS)
    first = next(bound for bound in tables.bounds(tables.points[0]) if bound.name == over)
    uppers = _grid(problem, points, over, first, to or _far(first), count, settings)
    found = tqdm(
        sweep(problem, points, over, uppers, settings), total=len(uppers), desc=over, unit="child", disable=None
    )
    kept = undominated([point for point in found if point is not None])
    rows = tuple(_row(tables, over, point) for point in kept)
    axis = f"{first.quantity.metric}, {'x the parent' if first.relative else UNITS[first.quantity.metric]}"
    axis += f"\n({first.quantity.setting.text})" if first.quantity.setting else ""
    files = _write(target, rows, axis, _marked(tables, first, params.targets, paths), params.report.png_dpi, paths)
    return Frontier(len(uppers), rows, axis, files)


def _only(tables: TargetTables, names: Sequence[str]) -> TargetTables:
    """The target with these constraints only."""
    known = tables.wanted.constraints
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise InputError(f"{tables.target} has no constraint {name!r}{hint} (has: {', '.join(known)})")
    kept = {name: known[name] for name in names}
    return replace(tables, wanted=tables.wanted.model_copy(update={"constraints": kept}))


def _far(bound: Bound) -> float:
    """Twice as good as the target asks for."""
    return bound.limit * 2 if bound.lower else bound.limit / 2


def _grid(
    problem: Problem[Replacement],
    points: Sequence[Point],
    over: str,
    bound: Bound,
    to: float,
    count: int,
    settings: Settings,
) -> list[float]:
    """Upper limits from the parent's total to that of `to`, or the least that there is; evenly spaced ratios."""
    most = bound.quantity.total_at(bound.parent_value)
    least = most
    for point in points:
        limits = (*problem.limits, *point.limits)
        swept = next(limit for limit in limits if limit.name == over)
        others = tuple(limit for limit in limits if limit is not swept)
        found, _ = minimise(replace(problem, limits=others), swept.coefficients, settings)
        if found is not None:
            least = min(least, abs(swept.total(found.chosen)))
    least = max(least, bound.quantity.total_at(to * bound.per_unit))
    if least >= most:
        raise InputError(f"no child of {problem.name} is better than the parent in {bound.text}")
    return [most * (least / most) ** (number / max(1, count - 1)) for number in range(count)]


def _row(tables: TargetTables, over: str, found: FrontierPoint[Replacement]) -> dict[str, Any]:
    solution, point = found.best.solution, tables.points[found.best.point]
    blocks = tuple(choice.replacement for choice in solution.chosen)
    predicted = tables.predict(blocks, WEIGHTS, point)
    bound = next(bound for bound in tables.bounds(point) if bound.name == over)
    return {
        "value": bound.measured(tables.costs, blocks),
        "metric": bound.quantity.metric,
        "unit": "x the parent's" if bound.relative else UNITS[bound.quantity.metric],
        "score": solution.objective,
        "score_stderr": predicted["score_stderr"],
        "bound": solution.bound,
        "gap": solution.gap,
        "status": solution.status,
        "price_per_percent": 0.01 * next(use.price for use in solution.uses if use.name == over),
        "block_params_ratio": predicted["block_params_ratio"],
        "kv_ratio": predicted["kv_ratio"],
        "memory_gib": predicted["memory_gib"],
        "operating_point": point.text,
        "blocks": json.dumps(Architecture(blocks).to_json()),
    }


def _marked(tables: TargetTables, bound: Bound, targets: Iterable[str], paths: Paths) -> list[Marked]:
    """The parent, every target's child, this one's baselines: those that were searched, each at its own best point."""
    marked: list[Marked] = []

    def mark(name: str, blocks: Sequence[Replacement], score: float, is_baseline: bool = False) -> None:
        value = tables.best_value(bound.name, blocks)
        if value is not None:
            marked.append(Marked(name, value / bound.per_unit, score, is_baseline))

    mark("parent", tables.parent.blocks, 0.0)
    for target in targets:
        if paths.architecture(target).is_file():
            one = read_json(paths.architecture(target), f"dvc repro search_architecture@{target}")
            mark(one["label"], Architecture.from_json(one["blocks"]).blocks, one["predicted"]["score"])
    if paths.baselines(tables.target).is_file():
        found = read_json(paths.baselines(tables.target), f"dvc repro search_baselines@{tables.target}")["baselines"]
        for name, one in found.items():
            if "blocks" in one and not name.startswith("random"):
                mark(name, Architecture.from_json(one["blocks"]).blocks, one["predicted"]["score"], is_baseline=True)
    return marked


def _write(
    target: str, rows: Sequence[dict[str, Any]], axis: str, marked: Sequence[Marked], dpi: int, paths: Paths
) -> tuple[str, ...]:
    table, svg, png = (paths.frontier(target).with_suffix(suffix) for suffix in (".parquet", ".svg", ".png"))
    proven = [Proven(row["value"], row["score"], row["price_per_percent"]) for row in rows]
    drawing = draw_frontier(f"Frontier of {target}", axis, proven, marked, dpi)
    with write_whole(table) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary, compression="zstd")
    for path, content in ((svg, drawing.svg.encode()), (png, drawing.png)):
        with write_whole(path) as temporary:
            temporary.write_bytes(content)
    return tuple(map(str, (table, svg, png)))
