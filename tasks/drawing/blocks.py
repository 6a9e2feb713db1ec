"""A child block by block: its variants, and its runtime beside the parent's (the announcement's figure 3).

In: architectures, milliseconds. Out: drawings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from storage.variants import Attention, Ffn, Replacement
from tasks.drawing.style import BLUE, GREEN, GREY, INK, LIGHT, ORANGE, Drawing, finish, panels, styled

_NARROW = 40
"""With more blocks than this, the words in the cells are turned upright."""


@dataclass(frozen=True)
class DrawnModel:
    """A model to draw: its name, its key in ids, its blocks."""

    label: str
    key: str
    blocks: Sequence[Replacement]


@dataclass(frozen=True)
class BlockRuntime:
    """Milliseconds of one subblock of a child, and of the parent's subblocks in its place."""

    parent_blocks: range
    component: str
    child_ms: float
    parent_ms: float


@dataclass(frozen=True)
class ChildRuntime:
    """A child's subblocks, each with its milliseconds; `meaning` says what they are of, where and how they were taken.

    An example: `ms of a decode step, measured timings: cpu, torch, float32, 128/128, batch 8`.
    """

    label: str
    meaning: str
    blocks: Sequence[BlockRuntime]

    def total(self, component: str) -> tuple[float, float]:
        """Sum the milliseconds of all attentions or FFNs: child, parent."""
        blocks = [block for block in self.blocks if block.component == component]
        return sum(block.child_ms for block in blocks), sum(block.parent_ms for block in blocks)


@styled
def architectures(models: Sequence[DrawnModel], dpi: int) -> Drawing:
    """Draw parent (first of `models`) and children: a cell per block and subblock, as tall as the variant is large."""
    figure, grid = panels(len(models), 1, 0.5 + 1.15 * len(models))
    for (axes,), model in zip(grid, models, strict=True):
        _architecture(axes, model, models[0].blocks[0])
    grid[-1][0].set_xlabel("block of the parent")
    description = "; ".join(f"{model.label}: {len(model.blocks)} blocks" for model in models)
    return finish(figure, "architecture", f"Architecture block by block. {description}", dpi)


def _architecture(axes: Axes, model: DrawnModel, full: Replacement) -> None:
    count = model.blocks[-1].parent_blocks[-1] + 1
    for block in model.blocks:
        for variant, floor, size in (
            (block.attention, 1.15, block.attention.num_kv_heads / max(full.attention.num_kv_heads, 1)),
            (block.ffn, 0.0, block.ffn.intermediate_size / max(full.ffn.intermediate_size, 1)),
        ):
            _cell(axes, model.key, block, variant, floor, size, upright=count > _NARROW)
    axes.set(xlim=(-0.6, count - 0.4), ylim=(-0.08, 2.2), yticks=[0.5, 1.65], yticklabels=["FFN", "attention"])
    axes.set_title(model.label, fontsize=9)
    axes.set_title(_kinds(model.blocks), fontsize=8, fontweight="normal", loc="right")
    axes.set_xticks(range(0, count, max(1, count // 15)))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _cell(
    axes: Axes, key: str, block: Replacement, variant: Attention | Ffn, floor: float, size: float, *, upright: bool
) -> None:
    """Draw a frame of the parent's size, filled as far as the variant is large; its id names target, block, variant."""
    part = "attention" if isinstance(variant, Attention) else "ffn"
    left, width = block.first_block - 0.46, block.span - 0.08
    frame = Rectangle((left, floor), width, 1.0, facecolor="white", edgecolor="#c9c9c9", linewidth=0.6)
    frame.set_gid(f"{key}-{part}-{block.first_block}-{variant.name}")
    axes.add_patch(frame)
    colour = ORANGE if variant.kind == "linear" else (BLUE if part == "attention" else GREEN)
    tall = 0.3 if variant.kind == "linear" else size
    axes.add_patch(Rectangle((left, floor), width, tall, facecolor=colour, alpha=0.55, linewidth=0))
    axes.text(
        left + width / 2,
        floor + 0.5,
        _word(variant),
        ha="center",
        va="center",
        fontsize=6.5,
        color=INK if variant.kind != "no_op" else GREY,
        rotation=90 if upright else 0,
    )


def _word(variant: Attention | Ffn) -> str:
    if variant.kind == "no_op":
        return "–"
    if variant.kind == "linear":
        return "lin"
    return str(variant.num_kv_heads if isinstance(variant, Attention) else variant.intermediate_size)


def _kinds(blocks: Sequence[Replacement]) -> str:
    """Say how many there are of each variant: `attention kv_3 ×22, no_op ×8; FFN ffn_1536 ×9, ...`."""
    attention = _counted([block.attention.name for block in blocks])
    ffn = _counted([block.ffn.name for block in blocks])
    spans = sum(block.span > 1 for block in blocks)
    return f"attention {attention}; FFN {ffn}" + (f"; {spans} of {len(blocks)} replace several blocks" if spans else "")


def _counted(names: Sequence[str]) -> str:
    """List names with their counts, large variants first."""
    ordered = sorted(set(names), key=lambda name: (-_size(name), name))
    return ", ".join(f"{name} ×{names.count(name)}" for name in ordered)


def _size(name: str) -> int:
    tail = name.rpartition("_")[2]
    return int(tail) if tail.isdigit() else 0


@styled
def runtimes(children: Sequence[ChildRuntime], dpi: int) -> Drawing:
    """Draw attention (upper row) and FFN (lower row) of every child against the parent, the saved part shaded."""
    figure, grid = panels(2 * len(children), 1, 3.5 * len(children) + 0.2)
    for number, child in enumerate(children):
        for axes, component in zip((grid[2 * number][0], grid[2 * number + 1][0]), ("attention", "ffn"), strict=True):
            _runtime(axes, child, component)
        grid[2 * number][0].sharey(grid[2 * number + 1][0])
        top = max(max(block.child_ms, block.parent_ms) / len(block.parent_blocks) for block in child.blocks)
        grid[2 * number][0].set_ylim(0, 1.08 * top)
        grid[2 * number + 1][0].set_xlabel(f"block of the parent\n({child.meaning})")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3)
    totals = [f"{child.label}: {_total(child, 'attention')}; {_total(child, 'ffn')}" for child in children]
    return finish(figure, "runtime_per_block", f"Runtime per block, child against parent. {'. '.join(totals)}", dpi)


def _runtime(axes: Axes, child: ChildRuntime, component: str) -> None:
    """Draw bars whose area is milliseconds: a span's bar is as wide as the blocks that it replaces."""
    blocks = [block for block in child.blocks if block.component == component]
    left = [block.parent_blocks[0] - 0.44 for block in blocks]
    width = [len(block.parent_blocks) - 0.12 for block in blocks]
    mine = [block.child_ms / len(block.parent_blocks) for block in blocks]
    parents = [block.parent_ms / len(block.parent_blocks) for block in blocks]
    colour = BLUE if component == "attention" else GREEN
    axes.bar(left, mine, width, align="edge", color=colour, alpha=0.75, label="child")
    saved = [max(0.0, theirs - ours) for ours, theirs in zip(mine, parents, strict=True)]
    shade: dict[str, Any] = {"color": LIGHT, "edgecolor": "#a8a8a8", "hatch": "////", "linewidth": 0.4}
    axes.bar(left, saved, width, bottom=mine, align="edge", label="saved (parent minus child)", **shade)
    axes.hlines(
        parents,
        left,
        [start + wide for start, wide in zip(left, width, strict=True)],
        color=INK,
        linewidth=0.9,
        label="parent",
    )
    last = max(block.parent_blocks[-1] for block in blocks)
    axes.set(xlim=(-0.6, last + 0.6), ylabel="ms per block")
    axes.set_title(f"{child.label}, {_total(child, component)}")
    axes.grid(axis="y")


def _total(child: ChildRuntime, component: str) -> str:
    ours, theirs = child.total(component)
    word = "attention" if component == "attention" else "FFN"
    share = f" ({1 - ours / theirs:.0%} saved)" if theirs else ""
    return f"{word}: {ours:.3g} ms of the parent's {theirs:.3g} ms{share}"
