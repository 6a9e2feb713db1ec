"""The frontier of one target: predicted quality against the metric of one of its constraints -> Parquet and a figure.

In: the tables that the search reads. Out: artifacts/frontier/<target>.parquet, .svg and .png, which no stage reads.
Run: `puzzle frontier --target like-51b --over decode`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
from tqdm import tqdm

from storage.architecture import read_architecture, read_baselines
from storage.files import InputError, did_you_mean, write_whole
from storage.params import Params
from storage.parquet_files import write_table
from storage.paths import Paths
from storage.variants import Architecture, Replacement
from tasks.drawing.frontier import Marked, Proven, draw_frontier
from tasks.puzzle.search.best_child import PointLimits
from tasks.puzzle.search.bounds import Bound
from tasks.puzzle.search.mip import SolverSettings, Status, minimise
from tasks.puzzle.search.operating_points import OperatingPoint
from tasks.puzzle.search.problem import Problem
from tasks.puzzle.search.sweep import FrontierPoint, sweep, undominated
from tasks.targets.target_tables import WEIGHTS, TargetTables, solver_settings

_GAP = 1e-4


@dataclass(frozen=True)
class FrontierRow:
    """A child of the frontier, a row of its table.

    Attributes:
        value: the swept metric's value, in `unit`.
        metric: the metric's name.
        unit: the constraint's unit, in words.
        score: the sum of scores, nats/token.
        score_stderr: its standard error; None where the scores have none.
        bound: proven lower bound of every child's score at this limit.
        gap: the proof's relative gap.
        status: the solver's status.
        price_per_percent: nats/token that the score would fall if the limit were loosened by 1 %.
        block_params_ratio: parameters of blocks, the child's over the parent's.
        kv_ratio: bytes of KV cache, the child's over the parent's.
        memory_gib: memory of each device.
        operating_point: batches and degrees that the search chose, in words.
        blocks: the architecture as JSON.
    """

    value: float
    metric: str
    unit: str
    score: float
    score_stderr: float | None
    bound: float
    gap: float
    status: Status
    price_per_percent: float
    block_params_ratio: float
    kv_ratio: float
    memory_gib: float
    operating_point: str
    blocks: str


@dataclass(frozen=True)
class Frontier:
    """The frontier of a target: how many values were tried, the undominated children as rows, and the files written."""

    tried: int
    rows: tuple[FrontierRow, ...]
    axis: str
    files: tuple[str, ...]


def frontier(
    target: str, over: str, keep: Sequence[str], to: float | None, count: int, params: Params, paths: Paths
) -> Frontier:
    """Sweep one constraint from the parent's value to `to`, or to the best value that any child reaches if less far.

    Args:
        target: the target's key; its pins, kinds, runtimes and operating points hold.
        over: name of the constraint whose limit is swept; its margin is left off.
        keep: names of constraints that hold as well.
        to: the value to end at, in the constraint's unit; None is twice as good as the target asks for.
        count: values to try, evenly spaced as ratios.
        params: settings of the solver, and the targets.
        paths: the tables' paths, and the frontier's.

    Raises:
        InputError: a table is missing or wrong, or a name is no constraint of the target.
    """
    tables = _only(replace(TargetTables.read(target, params, paths), speed_margin=0.0), [over, *keep])
    settings = replace(
        solver_settings(params.search_architecture, params.run.seed),
        relative_gap=max(_GAP, params.search_architecture.relative_gap),
    )
    problem, points = tables.problem(WEIGHTS)
    swept = _bound(tables, tables.limits.points[0], over)
    to = _twice_as_good(swept) if to is None else to
    uppers = _grid(problem, points, swept, to, count, settings)
    children = sweep(problem, points, over, uppers, settings)
    progress = tqdm(children, total=len(uppers), desc=over, unit="child", disable=None)
    best_children = undominated([child for child in progress if child is not None])
    rows = tuple(_row(tables, over, child) for child in best_children)
    axis = f"{swept.quantity.metric.name}, {'x the parent' if swept.relative else swept.unit}"
    axis += f"\n({swept.quantity.setting.text})" if swept.quantity.setting else ""
    marked = _marked(tables, swept, params.targets, paths)
    files = _write(target, rows, axis, marked, params.report.png_dpi, paths)
    return Frontier(len(uppers), rows, axis, files)


def _only(tables: TargetTables, names: Sequence[str]) -> TargetTables:
    """Return the target with these constraints only.

    Raises:
        InputError: a name is no constraint of the target.
    """
    constraints = tables.target.constraints
    for name in names:
        if name not in constraints:
            raise InputError(
                f"{tables.target_name} has no constraint {name!r}{did_you_mean(name, constraints)} "
                f"(has: {', '.join(constraints)})"
            )
    named = {name: constraints[name] for name in names}
    return replace(tables, target=tables.target.model_copy(update={"constraints": named}))


def _bound(tables: TargetTables, point: OperatingPoint, name: str) -> Bound:
    """Return the limit of this name at an operating point."""
    return next(bound for bound in tables.limits.bounds(point) if bound.name == name)


def _twice_as_good(bound: Bound) -> float:
    """Return the value that is twice as good as the limit."""
    return bound.limit * 2 if bound.lower else bound.limit / 2


def _grid(
    problem: Problem[Replacement],
    points: Sequence[PointLimits],
    bound: Bound,
    to: float,
    count: int,
    settings: SolverSettings,
) -> list[float]:
    """Return upper limits from the parent's total to that of `to`, or the least that there is; evenly spaced ratios.

    Raises:
        InputError: no child is better than the parent, or the parent itself has no value.
    """
    if bound.parent_value is None:
        raise InputError(f"{problem.name}: the parent, where the sweep starts, has no value of {bound.text}")
    most = bound.quantity.total_at(bound.parent_value)
    least = most
    for point in points:
        limits = (*problem.limits, *point.limits)
        swept = next(limit for limit in limits if limit.name == bound.name)
        others = tuple(limit for limit in limits if limit is not swept)
        cover, _ = minimise(replace(problem, limits=others), swept.coefficients, settings)
        if cover is not None:
            least = min(least, abs(swept.total(cover.chosen)))
    least = max(least, bound.quantity.total_at(to * bound.per_unit))
    if least >= most:
        raise InputError(f"no child of {problem.name} is better than the parent in {bound.text}")
    return [most * (least / most) ** (number / max(1, count - 1)) for number in range(count)]


def _row(tables: TargetTables, over: str, child: FrontierPoint[Replacement]) -> FrontierRow:
    """Make a row of the frontier's table."""
    solution, point = child.best.solution, tables.limits.points[child.best.point_index]
    blocks = tuple(choice.replacement for choice in solution.chosen)
    predicted = tables.predict(blocks, WEIGHTS, point)
    bound = _bound(tables, point, over)
    return FrontierRow(
        value=bound.value(tables.costs, blocks),
        metric=bound.quantity.metric.name,
        unit=bound.unit,
        score=solution.objective,
        score_stderr=predicted.score_stderr,
        bound=solution.bound,
        gap=solution.gap,
        status=solution.status,
        price_per_percent=0.01 * next(use.price for use in solution.uses if use.name == over),
        block_params_ratio=predicted.block_params_ratio,
        kv_ratio=predicted.kv_ratio,
        memory_gib=predicted.memory_gib,
        operating_point=point.text,
        blocks=json.dumps(Architecture(blocks).to_json()),
    )


def _marked(tables: TargetTables, bound: Bound, targets: Iterable[str], paths: Paths) -> list[Marked]:
    """List the parent, every target's child, this one's baselines: those that were searched, each at its best point."""
    marked: list[Marked] = []

    def mark(name: str, blocks: Sequence[Replacement], score: float, is_baseline: bool = False) -> None:
        value = tables.limits.best_value(bound.name, blocks)
        if value is not None:
            marked.append(Marked(name, value / bound.per_unit, score, is_baseline))

    mark("parent", tables.parent.blocks, 0.0)
    for target in targets:
        if paths.architecture(target).is_file():
            child = read_architecture(target, paths)
            mark(child.label, child.blocks, child.predicted.score)
    if paths.baselines(tables.target_name).is_file():
        for name, baseline in read_baselines(tables.target_name, paths).items():
            if baseline.blocks and baseline.predicted and not name.startswith("random"):
                mark(name, baseline.blocks, baseline.predicted.score, is_baseline=True)
    return marked


def _write(
    target: str, rows: Sequence[FrontierRow], axis: str, marked: Sequence[Marked], dpi: int, paths: Paths
) -> tuple[str, ...]:
    table, svg, png = (paths.frontier(target).with_suffix(suffix) for suffix in (".parquet", ".svg", ".png"))
    proven = [Proven(row.value, row.score, row.price_per_percent) for row in rows]
    drawing = draw_frontier(f"Frontier of {target}", axis, proven, marked, dpi)
    write_table(table, pa.Table.from_pylist([asdict(row) for row in rows]))
    for path, content in ((svg, drawing.svg.encode()), (png, drawing.png)):
        with write_whole(path) as temporary:
            temporary.write_bytes(content)
    return tuple(map(str, (table, svg, png)))
