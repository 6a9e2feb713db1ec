"""The frontier of predicted quality against one metric, and the marginal price of more of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.drawing.style import BLUE, GREY, LINE, ORANGE, Drawing, finish, panels, spaced_apart, styled

_GAP = 0.05
"""Least distance of labels, as a share of the axes' height."""


@dataclass(frozen=True)
class Proven:
    """A child that is proven best at its value of the metric: sum of scores, and price of 1 % more (nats/token)."""

    value: float
    score: float
    price: float


@dataclass(frozen=True)
class Marked:
    """Another model, shown beside the frontier."""

    name: str
    value: float
    score: float
    is_baseline: bool


@styled
def draw_frontier(title: str, axis: str, proven: Sequence[Proven], marked: Sequence[Marked], dpi: int) -> Drawing:
    """Draw the sum of scores over the metric (left) and the price of 1 % more (right), all predicted from the tables.

    Args:
        title: the left panel's title.
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
    heights = [min(model.score, high) for model in marked]
    levels = spaced_apart([(height - low) / (high - low) for height in heights], _GAP)
    for model, height, level in zip(marked, heights, levels, strict=True):
        colour = ORANGE if model.is_baseline else GREY if model.name == "parent" else BLUE
        marker = "s" if model.is_baseline else "D"
        row[0].plot(model.value, height, marker, color=colour, markerfacecolor="white")
        row[0].annotate(
            f"{model.name} {model.score:.2f}",
            (model.value, height),
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
    """Return the upper end of the axis: models far above the frontier are cut off, since they would flatten it."""
    highest = max(point.score for point in proven)
    return 1.05 * max([highest, *(model.score for model in marked if model.score <= 2 * highest)])
