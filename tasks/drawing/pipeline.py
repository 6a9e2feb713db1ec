"""The figure of the pipeline: a box per stage, an arrow per dependency that no other dependency implies."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from tasks.drawing.style import BLUE, GREY, INK, WIDTH, Drawing, finish, panels, styled

BOX_WIDTH, BOX_HEIGHT = 2.35, 0.52
_ROW_STEP = 0.88
_TURN = 0.13
"""Inches from a box at which an arrow turns: arrows that leave a row and those that arrive from afar keep apart."""

Cell = tuple[int, float]
"""Row and column of a box."""


@dataclass(frozen=True)
class StageBox:
    """A stage: its name, the stages whose artifacts it reads, its first artifact, and whether each target has one."""

    name: str
    after: frozenset[str]
    artifact: str
    per_target: bool


@styled
def pipeline(stages: Sequence[StageBox], dpi: int) -> Drawing:
    """Draw stages in rows by depth, top down; boxes of the stages that run for each target are filled."""
    after = _needed({stage.name: stage.after for stage in stages})
    cells = _cells(after)
    height = max(row for row, _ in cells.values())
    figure, ((axes,),) = panels(1, 1, (height + 1) * _ROW_STEP)
    for stage in stages:
        for earlier in sorted(after[stage.name]):
            _arrow(axes, route(cells[earlier], cells[stage.name], cells.values()))
        _box(axes, stage, cells[stage.name])
    reach = max(abs(column) for _, column in cells.values()) * (BOX_WIDTH + 0.35) + BOX_WIDTH / 2 + 0.1
    reach = max(reach, WIDTH / 2)
    axes.set(xlim=(-reach, reach), ylim=(-(height + 0.5) * _ROW_STEP, 0.5 * _ROW_STEP))
    axes.set_axis_off()
    words = "; ".join(f"{name} after {', '.join(sorted(earlier))}" for name, earlier in after.items() if earlier)
    return finish(figure, "pipeline", f"The stages and what each needs: {words}", dpi)


def _needed(after: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Return the dependencies of each stage without those that follow from others (transitive reduction)."""

    def all_before(name: str) -> frozenset[str]:
        return frozenset().union(after[name], *(all_before(earlier) for earlier in after[name]))

    needed = {}
    for name, direct in after.items():
        implied = frozenset().union(*(all_before(earlier) for earlier in direct))
        needed[name] = direct - implied
    return needed


def _cells(after: Mapping[str, frozenset[str]]) -> dict[str, Cell]:
    """Return the row (as late as what follows allows) and column (centred about 0) of each stage."""
    followers = {name: [later for later, earlier in after.items() if name in earlier] for name in after}

    def depth(name: str) -> int:
        return 1 + max((depth(earlier) for earlier in after[name]), default=-1)

    deepest = max(depth(name) for name in after)

    def row(name: str) -> int:
        return min((row(later) for later in followers[name]), default=deepest + 1) - 1

    rows: dict[int, list[str]] = {}
    for name in after:
        rows.setdefault(row(name), []).append(name)
    cells = {}
    for index, names in rows.items():
        for column, name in enumerate(names):
            cells[name] = (index, column - (len(names) - 1) / 2)
    return cells


def position(cell: Cell) -> tuple[float, float]:
    """Return the coordinates of the middle of a box, inches."""
    row, column = cell
    return column * (BOX_WIDTH + 0.35), -row * _ROW_STEP


def _box(axes: Axes, stage: StageBox, cell: Cell) -> None:
    x, y = position(cell)
    box = FancyBboxPatch(
        (x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2),
        BOX_WIDTH,
        BOX_HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor="#e8f1f8" if stage.per_target else "white",
        edgecolor=BLUE if stage.per_target else GREY,
        linewidth=1,
    )
    box.set_gid(f"stage-{stage.name}")
    axes.add_patch(box)
    axes.text(x, y + 0.09, stage.name, ha="center", va="center", fontsize=9, fontweight="bold", color=INK)
    axes.text(x, y - 0.12, stage.artifact, ha="center", va="center", fontsize=7, color=GREY)


def _arrow(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    axes.plot(*zip(*points, strict=True), color=GREY, linewidth=1, solid_joinstyle="round")
    x, y = points[-1]
    axes.plot(x, y + 0.05, marker="v", color=GREY, markersize=4)


def route(start: Cell, end: Cell, cells: Collection[Cell]) -> list[tuple[float, float]]:
    """Return an arrow's corners: straight to the next row, to a later row down a lane clear of the boxes in between."""
    (x0, y0), (x1, y1) = position(start), position(end)
    top, bottom = y0 - BOX_HEIGHT / 2, y1 + BOX_HEIGHT / 2
    below, above = top - _TURN, bottom + _TURN
    between = [abs(position(cell)[0]) + BOX_WIDTH / 2 for cell in cells if start[0] < cell[0] < end[0]]
    if not between or abs(x1) > max(between):
        return [(x0, top), (x0, below), (x1, below), (x1, bottom)]
    lane = math.copysign(max(between) + 0.18, x1)
    return [(x0, top), (x0, below), (lane, below), (lane, above), (x1, above), (x1, bottom)]
