"""The frontier of predicted quality against one metric, and the marginal price of more of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.drawing.style import BLUE, GREY, LINE, ORANGE, Drawing, finish, panels, spread, styled

_GAP = 0.05
"""Least distance of labels, as a share of the axes' height."""


@dataclass(frozen=True)
class Proven:
    """A child that is proven to be the best at its value: sum of scores in nats/token, and the price of 1 % more."""

    value: float
    score: float
    price: float


@dataclass(frozen=True)
class Marked:
    """Another model to show beside the frontier."""

    name: str
    value: float
    score: float
    is_baseline: bool


@styled
def draw_frontier(title: str, axis: str, proven: Sequence[Proven], marked: Sequence[Marked], dpi: int) -> Drawing:
    """Left: sum of scores over the metric; right: what 1 % more of it costs. All of it predicted from the tables.

    Args:
        title: of the figure.
        axis: the metric with its unit.
        proven: the frontier, by rising value.
        marked: parent, targets and baselines.
        dpi: pixels per inch of the PNG.
    """
    figure, (row,) = panels(1, 2, 4.4)
    values = [point.value for point in proven]
    row[0].plot(values, [point.score for point in proven], ".-", color=BLUE, markersize=4, label="best child, proven")
    low, high = min(0.0, *(point.score for point in proven)), _top(proven, marked)
    row[0].set_ylim(low, high)
    levels = spread([(min(one.score, high) - low) / (high - low) for one in marked], _GAP)
    for one, level in zip(marked, levels, strict=True):
        colour = ORANGE if one.is_baseline else GREY if one.name == "parent" else BLUE
        row[0].plot(
            one.value, min(one.score, high), "s" if one.is_baseline else "D", color=colour, markerfacecolor="white"
        )
        row[0].annotate(
            f"{one.name} {one.score:.2f}",
            (one.value, min(one.score, high)),
            xytext=(1.03, level),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": LINE, "linewidth": 0.5, "relpos": (0, 0.5)},
        )
    row[0].set(xlabel=axis, title=title)
    row[0].set_ylabel("sum of replace-1-block scores, nats/token\n(predicted; lower is better)")
    row[1].plot(values, [point.price for point in proven], ".-", color=BLUE, markersize=4)
    row[1].set(xlabel=axis, ylabel="nats/token for 1 % more (predicted)", title="Marginal price")
    for axes in row:
        axes.grid()
    words = ", ".join(f"{point.value:.3g}: {point.score:.3f}" for point in proven[:: max(1, len(proven) // 8)])
    return finish(figure, "frontier", f"{title}. Sum of scores by {axis}: {words}", dpi)


def _top(proven: Sequence[Proven], marked: Sequence[Marked]) -> float:
    """Baselines far above the frontier are cut off, or they would flatten it."""
    highest = max(point.score for point in proven)
    return 1.05 * max([highest, *(one.score for one in marked if one.score <= 2 * highest)])
