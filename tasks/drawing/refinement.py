"""Figure of the whole-child correction: the child's error along depth, as assembled and corrected."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from storage.refinement import BlockRefinement, Refinement
from tasks.drawing.style import BLUE, ORANGE, Drawing, finish, panels, styled


@styled
def error_along_depth(children: Mapping[str, Refinement], dpi: int) -> Drawing:
    """Draw a panel per child: the error behind each block before and after the correction, on one logarithmic axis.

    Blocks without an error, which are the parent's with nothing replaced before them, have no point.

    Args:
        children: the corrections, each by its target's label.
        dpi: pixels per inch of the PNG.
    """
    figure, grid = panels(1, len(children), 3.0, share_y=True)
    for axes, (label, refinement) in zip(grid[0], children.items(), strict=True):
        _panel(axes, label, refinement.blocks)
    grid[0][0].set_ylabel("|parent − child|² / |parent|²,\nmean over held-out tokens")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2)
    words = [f"{label}: {_last(refinement.blocks)}" for label, refinement in children.items()]
    return finish(figure, "refinement", f"Error of the hidden states along depth. {'; '.join(words)}", dpi)


def _panel(axes: Axes, label: str, blocks: Sequence[BlockRefinement]) -> None:
    shown = [block for block in blocks if block.error_assembled > 0 and block.error_refined > 0]
    ends = [block.first_block + block.span - 1 for block in shown]
    axes.plot(
        ends, [block.error_assembled for block in shown], "o-", color=ORANGE, mfc="white", ms=4, label="assembled"
    )
    axes.plot(ends, [block.error_refined for block in shown], "o-", color=BLUE, ms=4, label="corrected")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("behind block of the parent")
    axes.set_title(label)
    axes.grid(axis="y")


def _last(blocks: Sequence[BlockRefinement]) -> str:
    """Say how large the errors behind the last block are."""
    if not blocks:
        return "not corrected"
    return f"{blocks[-1].error_assembled:.3f} before, {blocks[-1].error_refined:.3f} after, behind the last block"
