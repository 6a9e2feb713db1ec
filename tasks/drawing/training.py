"""Figures of training: BLD's losses of every variant, and the curves of global distillation (GKD)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from storage.gkd import GkdCurve
from tasks.drawing.style import BLUE, GREY, LINE, ORANGE, PALE_BLUE, Drawing, finish, panels, styled

_COLUMNS = 3
LOSS_WORDS = {"normalised_mse": "normalised MSE", "token_mse": "relative MSE, token by token", "cosine": "1 - cosine"}


@dataclass(frozen=True)
class BldLoss:
    """Held-out loss of one variant of a block, or of a span of blocks.

    Attributes:
        first_block: parent block that the variant replaces, the first one of a span.
        span: number of parent blocks that it replaces.
        subblock: attention, ffn or whole.
        variant: its name.
        loss: kind of loss, a key of LOSS_WORDS.
        before: the loss with the initial weights.
        fitted: the loss after the closed-form fit; equal to `before` where there was none.
        after: the loss with the weights that are kept.
    """

    first_block: int
    span: int
    subblock: str
    variant: str
    loss: str
    before: float
    fitted: float
    after: float

    @property
    def title(self) -> str:
        """Return the variant's name, with its subblock where the name does not tell it."""
        name = self.variant if self.variant[-1].isdigit() else f"{self.subblock} {self.variant}"
        name = "whole block" if self.subblock == "whole" else name
        return name if self.span == 1 else f"{name}, for {self.span} blocks"


@styled
def bld_losses(losses: Sequence[BldLoss], dpi: int) -> Drawing:
    """Draw a panel per variant: each block's loss before and after BLD, on one logarithmic axis."""
    titles = list(dict.fromkeys(loss.title for loss in losses))
    rows = -(-len(titles) // _COLUMNS)
    figure, grid = panels(rows, _COLUMNS, 0.6 + 1.9 * rows, share_y=True)
    cells = [axes for row in grid for axes in row]
    for axes, title in zip(cells, titles, strict=False):
        _variant(axes, title, [loss for loss in losses if loss.title == title])
    for axes in cells[len(titles) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(", ".join(dict.fromkeys(LOSS_WORDS[loss.loss] for loss in losses)))
    for axes in cells[max(0, len(titles) - _COLUMNS) : len(titles)]:
        axes.set_xlabel("block of the parent")
    handles, names = cells[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3)
    better = sum(loss.after < loss.before for loss in losses)
    description = f"BLD loss before and after: {better} of {len(losses)} variants improved"
    return finish(figure, "bld_losses", description, dpi)


def _variant(axes: Axes, title: str, losses: Sequence[BldLoss]) -> None:
    blocks = [loss.first_block for loss in losses]
    axes.vlines(blocks, [loss.after for loss in losses], [loss.before for loss in losses], color=LINE, linewidth=0.9)
    axes.plot(blocks, [loss.before for loss in losses], "o", color=ORANGE, mfc="white", ms=4, label="initial weights")
    fits = [loss for loss in losses if loss.fitted != loss.before]
    fitted_blocks, fitted = [fit.first_block for fit in fits], [fit.fitted for fit in fits]
    axes.plot(fitted_blocks, fitted, "_", color=GREY, ms=6, label="closed-form fit")
    axes.plot(blocks, [loss.after for loss in losses], "o", color=BLUE, ms=4, label="after BLD (kept)")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y")


@styled
def gkd_curves(children: Mapping[str, GkdCurve], dpi: int) -> Drawing:
    """Draw KL to the parent in training and on held-out text, the hidden states' cosine distance, the gradient's norm.

    Args:
        children: the curves, each by its target's label.
        dpi: pixels per inch of the PNG.
    """
    figure, grid = panels(3, len(children), 6.6, (2.2, 1.0, 1.0))
    for (label, curve), *axes in zip(children.items(), *grid, strict=True):
        _curve(axes, label, curve)
    grid[0][0].set_ylabel("KL(parent || child), nats/token")
    grid[1][0].set_ylabel("1 − cosine,\nmean over blocks")
    grid[2][0].set_ylabel("norm of the\ngradient")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3)
    words = [
        f"{label}: held-out KL {curve.held_out[0].kl:.3f} before, {_best_kl(curve):.3f} at best"
        for label, curve in children.items()
    ]
    return finish(figure, "gkd", f"Global distillation. {'; '.join(words)}", dpi)


def _best_kl(curve: GkdCurve) -> float:
    """Return the lowest held-out KL, nats/token."""
    return min(measurement.kl for measurement in curve.held_out)


def _curve(column: Sequence[Axes], label: str, curve: GkdCurve) -> None:
    kl, cosine, norm = column
    tokens, held_out_tokens = [step.tokens for step in curve.steps], [point.tokens for point in curve.held_out]
    kl.plot(tokens, [step.kl for step in curve.steps], color=PALE_BLUE, linewidth=1, label="training batches")
    kl.plot(held_out_tokens, [point.kl for point in curve.held_out], "o-", color=BLUE, ms=4, label="held-out text")
    cosine.plot(tokens, [step.cosine for step in curve.steps], color=ORANGE, linewidth=1)
    norm.plot(tokens, [step.gradient_norm for step in curve.steps], color=GREY, linewidth=1)
    norm.set_yscale("log")
    for axes in column:
        axes.axvline(curve.best.tokens, color=GREY, linestyle=":", linewidth=1, label="kept: best on held-out text")
        axes.grid()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    norm.set_xlabel("GKD tokens")
    kl.set_title(label)
