"""What training did: BLD's losses of every variant, and the curve of global distillation (GKD)."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tasks.drawing.style import BLUE, GREY, LINE, ORANGE, PALE_BLUE, Drawing, finish, panels, styled

_COLUMNS = 3
LOSS_WORDS = {"normalised_mse": "normalised MSE", "token_mse": "relative MSE, token by token", "cosine": "1 - cosine"}


@dataclass(frozen=True)
class BldLoss:
    """Held-out loss of a variant of one block, of the kind `loss`: untrained, after the closed-form fit, as kept."""

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
        """The variant's name, with its subblock where the name does not tell it."""
        own = self.variant if self.variant[-1].isdigit() else f"{self.subblock} {self.variant}"
        own = "whole block" if self.subblock == "whole" else own
        return own if self.span == 1 else f"{own}, for {self.span} blocks"


@styled
def bld_losses(losses: Sequence[BldLoss], dpi: int) -> Drawing:
    """A panel per variant: each block's loss before and after BLD, on one logarithmic axis."""
    titles = list(dict.fromkeys(loss.title for loss in losses))
    rows = -(-len(titles) // _COLUMNS)
    figure, grid = panels(rows, _COLUMNS, 0.6 + 1.9 * rows, share_y=True)
    everywhere = [axes for row in grid for axes in row]
    for axes, title in zip(everywhere, titles, strict=False):
        _variant(axes, title, [loss for loss in losses if loss.title == title])
    for axes in everywhere[len(titles) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(", ".join(dict.fromkeys(LOSS_WORDS[loss.loss] for loss in losses)))
    for axes in everywhere[max(0, len(titles) - _COLUMNS) : len(titles)]:
        axes.set_xlabel("block of the parent")
    handles, names = everywhere[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3)
    better = sum(loss.after < loss.before for loss in losses)
    description = f"BLD loss before and after: {better} of {len(losses)} variants improved"
    return finish(figure, "bld_losses", description, dpi)


def _variant(axes: Axes, title: str, losses: Sequence[BldLoss]) -> None:
    blocks = [loss.first_block for loss in losses]
    axes.vlines(blocks, [loss.after for loss in losses], [loss.before for loss in losses], color=LINE, linewidth=0.9)
    axes.plot(blocks, [loss.before for loss in losses], "o", color=ORANGE, mfc="white", ms=4, label="initial weights")
    fits = [loss for loss in losses if loss.fitted != loss.before]
    axes.plot([f.first_block for f in fits], [f.fitted for f in fits], "_", color=GREY, ms=6, label="closed-form fit")
    axes.plot(blocks, [loss.after for loss in losses], "o", color=BLUE, ms=4, label="after BLD (kept)")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=9)
    axes.grid(axis="y")


@dataclass(frozen=True)
class Gkd:
    """One child's GKD: steps (tokens, KL, cosine distance) in training, and (tokens, KL) on held-out text."""

    label: str
    steps: Sequence[tuple[int, float, float]]
    held_out: Sequence[tuple[int, float]]
    best_tokens: int


@styled
def gkd_curves(children: Sequence[Gkd], dpi: int) -> Drawing:
    """KL to the parent in training and on held-out text (upper row), and the hidden states' cosine distance."""
    figure, grid = panels(2, len(children), 5.2, (2.2, 1.0))
    for column, child in enumerate(children):
        _curve(grid[0][column], grid[1][column], child)
    grid[0][0].set_ylabel("KL(parent || child), nats/token")
    grid[1][0].set_ylabel("1 − cosine,\nmean over blocks")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3)
    words = [f"{c.label}: held-out KL {c.held_out[0][1]:.3f} before, {_best(c):.3f} at best" for c in children]
    return finish(figure, "gkd", f"Global distillation. {'; '.join(words)}", dpi)


def _best(child: Gkd) -> float:
    return min(kl for _, kl in child.held_out)


def _curve(upper: Axes, lower: Axes, child: Gkd) -> None:
    tokens = [step[0] for step in child.steps]
    upper.plot(tokens, [step[1] for step in child.steps], color=PALE_BLUE, linewidth=1, label="training batches")
    upper.plot(*zip(*child.held_out, strict=True), "o-", color=BLUE, ms=4, label="held-out text")
    for axes in (upper, lower):
        axes.axvline(child.best_tokens, color=GREY, linestyle=":", linewidth=1, label="kept: best on held-out text")
        axes.grid()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    lower.plot(tokens, [step[2] for step in child.steps], color=ORANGE, linewidth=1)
    lower.set_xlabel("GKD tokens")
    upper.set_title(child.label)
