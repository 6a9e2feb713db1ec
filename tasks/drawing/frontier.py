"""The frontier of predicted quality against one metric, and the marginal price of more of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.drawing.style import BLUE, GREY, ORANGE, Drawing, finish, panels, styled


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
    for one in marked:
        colour, marker = (ORANGE, "s") if one.is_baseline else (GREY if one.name == "parent" else BLUE, "D")
        row[0].plot(one.value, one.score, marker, color=colour, markersize=7, markerfacecolor="white")
        row[0].annotate(one.name, (one.value, one.score), xytext=(6, 3), textcoords="offset points", fontsize=8)
    row[0].set(
        xlabel=axis, ylabel="sum of replace-1-block scores, nats/token\n(predicted; lower is better)", title=title
    )
    row[0].set_ylim(bottom=min(0.0, *(point.score for point in proven)), top=_top(proven, marked))
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
