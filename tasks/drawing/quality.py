"""Quality against throughput, and predictions against measurements.

In: the models of each target, tokens/s of parent and child. Out: drawings.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.drawing.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINE,
    ORANGE,
    PALE_BLUE,
    Drawing,
    finish,
    legend_name,
    panels,
    spaced_apart,
    styled,
)

Series = Literal["parent", "assembled", "refined", "distilled", "baseline"]
_LOOKS: dict[Series, tuple[str, str, str]] = {
    "parent": ("parent", GREY, "D"),
    "assembled": ("child, assembled", PALE_BLUE, "o"),
    "refined": ("child, refined", GREEN, "o"),
    "distilled": ("child, distilled", BLUE, "o"),
    "baseline": ("baseline, assembled", ORANGE, "s"),
}
_GAP = 0.05
"""Least distance of labels, as a share of the axes' height."""


@dataclass(frozen=True)
class QualityPoint:
    """A model in the figures of quality.

    Attributes:
        name: the label's text.
        series: kind of model.
        kl: measured KL to the parent, nats/token.
        kl_stderr: its standard error; None where it has none.
        measured_ratio: measured speed over the parent's; None where it was not measured.
        predicted_ratio: speed over the parent's by the cost table; None where the target limits no speed.
        score: predicted KL (sum of replace-1-block scores), nats/token; None where there is none.
    """

    name: str
    series: Series
    kl: float
    kl_stderr: float | None
    measured_ratio: float | None = None
    predicted_ratio: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class QualityPanel:
    """The models of one target, measured on the text of one domain.

    Attributes:
        label: the target's name for people.
        domain: the domain's name.
        setting: the compared speed and its setting, in words.
        tables: the timings that predicted speeds rest on.
        points: the models, the parent first.
    """

    label: str
    domain: str
    setting: str
    tables: str
    points: Sequence[QualityPoint]


@styled
def quality_throughput(domains: Sequence[Sequence[QualityPanel]], dpi: int) -> Drawing:
    """Draw KL to the parent over relative throughput: filled markers are measured, hollow ones predicted.

    Args:
        domains: for each domain a row of panels, one for each target.
        dpi: pixels per inch of the PNG.
    """
    figure, grid = panels(len(domains), len(domains[0]), 0.8 + 3.8 * len(domains), share_y=True)
    cells = [axes for row in grid for axes in row]
    shown = list(itertools.chain.from_iterable(domains))
    for axes, target in zip(cells, shown, strict=True):
        _frontier(axes, target)
    for row in grid:
        row[0].set_ylabel("KL(parent || model), nats/token, measured\n(± standard error; lower is better)")
    points = list(itertools.chain.from_iterable(target.points for target in shown))
    linear = _linear_below([point.kl for point in points])
    top = max(point.kl + (point.kl_stderr or 0.0) for point in points)
    cells[0].set_yscale("symlog", linthresh=linear, linscale=0.35)
    cells[0].set_ylim(-0.12 * linear, max(top, linear) * 1.5)
    ticks = [0.0, *_round_numbers(linear, top * 1.5)]
    cells[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    for axes in cells:
        axes.minorticks_off()
    for axes, target in zip(cells, shown, strict=True):
        _label(axes, target.points)
    _legend(figure, cells)
    words = []
    for target in shown:
        qualities = [f"{point.name} KL {point.kl:.3f}" for point in target.points]
        words.append(f"{target.label} on {target.domain} text: {', '.join(qualities)}")
    return finish(figure, "quality_throughput", f"Quality against throughput. {'. '.join(words)}", dpi)


def _frontier(axes: Axes, target: QualityPanel) -> None:
    named: set[str] = set()
    for point in target.points:
        word, colour, marker = _LOOKS[point.series]
        for ratio, how in ((point.measured_ratio, "measured"), (point.predicted_ratio, "predicted")):
            if ratio is None:
                continue
            text = f"{word}, throughput {how}"
            axes.errorbar(
                ratio,
                point.kl,
                yerr=point.kl_stderr,
                fmt=marker,
                color=colour,
                markerfacecolor=colour if how == "measured" else "white",
                markersize=7,
                elinewidth=1,
                label=text if text not in named else None,
            )
            named.add(text)
        if point.measured_ratio is not None and point.predicted_ratio is not None:
            axes.plot((point.measured_ratio, point.predicted_ratio), (point.kl, point.kl), ":", color=colour, lw=1)
    axes.axvline(1.0, color=LINE, linewidth=0.8, zorder=0)
    axes.margins(x=0.1)
    axes.grid()
    axes.set_title(f"{target.label}, {target.domain} text")
    axes.set_xlabel(
        f"throughput ÷ the parent's: {target.setting}\n(filled: measured; hollow:\npredicted from {target.tables})"
    )


def _label(axes: Axes, points: Sequence[QualityPoint]) -> None:
    """Write names and KLs in a column at the right, about as high as their points, with a line to each point."""
    ratios = [point.measured_ratio or point.predicted_ratio for point in points]
    shown = [(ratio, point) for ratio, point in zip(ratios, points, strict=True) if ratio is not None]
    heights = [_height(axes, point.kl) for _, point in shown]
    for (ratio, point), level in zip(shown, spaced_apart(heights, _GAP), strict=True):
        axes.annotate(
            f"{point.name} {point.kl:.3f}",
            (ratio, point.kl),
            xytext=(1.04, level),
            textcoords="axes fraction",
            fontsize=8,
            color=INK,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": LINE,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def _height(axes: Axes, kl: float) -> float:
    """Return the height of a KL on the axis, 0 at the bottom and 1 at the top."""
    low, high, height = (float(axes.yaxis.get_transform().transform(value)) for value in (*axes.get_ylim(), kl))
    return (height - low) / (high - low)


def _legend(figure: Figure, row: Sequence[Axes]) -> None:
    """Draw one legend for all panels, below them."""
    entries: dict[str, Artist] = {}
    for axes in row:
        handles, names = axes.get_legend_handles_labels()
        for handle, name in zip(handles, names, strict=True):
            entries.setdefault(name, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=3, fontsize=8)


def _linear_below(values: Sequence[float]) -> float:
    """Return the KL where the axis turns from linear to logarithmic, a round number below the least above rounding."""
    smallest = min((value for value in values if value > 1e-3), default=0.1)
    return _round_numbers(10.0 ** math.floor(math.log10(smallest)), smallest)[-1]


def _round_numbers(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2, 5, 10, 20, ... (times powers of ten) from `low` to `high`."""
    numbers, power = [], 10.0 ** math.floor(math.log10(low))
    while power <= high:
        numbers += [round(factor * power, 12) for factor in (1, 2, 5)]
        power *= 10
    return [number for number in numbers if low <= number <= high]


@dataclass(frozen=True)
class SpeedPoint:
    """Tokens/s of parent or child (`model`) in one setting, by the cost table and as measured."""

    model: str
    predicted: float
    measured: float


@styled
def predicted_measured(targets: Sequence[QualityPanel], speeds: Sequence[SpeedPoint], dpi: int) -> Drawing:
    """Draw sum of scores against KL of assembled models (left), and predicted against measured tokens/s (right)."""
    figure, (row,) = panels(1, 2, 4.2)
    points: list[tuple[str, QualityPoint]] = []
    for target in targets:
        points += [(target.label, point) for point in target.points if point.score is not None]
    for (_, point), marker in zip(points, _markers(points), strict=True):
        _, colour, _ = _LOOKS[point.series]
        row[0].errorbar(point.score or 0.0, point.kl, yerr=point.kl_stderr, fmt=marker, color=colour, markersize=6)
    _diagonal(row[0], [*(point.score or 0.0 for _, point in points), *(point.kl for _, point in points)])
    row[0].set_title("Quality")
    row[0].set(xlabel="predicted: sum of replace-1-block scores, nats/token", ylabel="measured: KL, nats/token")
    _key(row[0], points)
    for name, marker, colour in (("parent", "D", GREY), ("child", "o", BLUE)):
        shown = [speed for speed in speeds if speed.model == name]
        row[1].plot(
            [speed.predicted for speed in shown],
            [speed.measured for speed in shown],
            marker,
            color=colour,
            label=name,
            alpha=0.8,
        )
    _diagonal(row[1], [*(speed.predicted for speed in speeds), *(speed.measured for speed in speeds)])
    row[1].set_title("Speed")
    row[1].set(xlabel="predicted from the cost table, tokens/s", ylabel="measured, tokens/s")
    if speeds:
        row[1].legend(loc="upper left")
    else:
        row[1].text(0.5, 0.5, "not measured in this run", transform=row[1].transAxes, ha="center", color=GREY)
    words = [f"{label} {point.name}: predicted {point.score:.3f}, measured {point.kl:.3f}" for label, point in points]
    return finish(figure, "predicted_measured", f"Predicted against measured. {'; '.join(words)}", dpi)


def _markers(points: Sequence[tuple[str, QualityPoint]]) -> list[str]:
    """Return a marker for each target, the same for all of its models."""
    labels = list(dict.fromkeys(label for label, _ in points))
    return ["os^vDP"[labels.index(label) % 6] for label, _ in points]


def _key(axes: Axes, points: Sequence[tuple[str, QualityPoint]]) -> None:
    """Draw a legend: a marker per target, a colour per kind of model."""
    markers = dict(zip([label for label, _ in points], _markers(points), strict=True))
    for label, marker in markers.items():
        axes.plot([], [], marker, color=GREY, label=legend_name(label))
    for series in dict.fromkeys(point.series for _, point in points):
        word, colour, _ = _LOOKS[series]
        axes.plot([], [], "s", color=colour, markersize=9, label=word)
    axes.legend(loc="upper left", fontsize=8)


def _diagonal(axes: Axes, values: Sequence[float]) -> None:
    """Draw where prediction and measurement agree, on logarithmic axes of the same range."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.4, max(positive) * 1.4
    axes.plot((low, high), (low, high), color=LINE, linewidth=0.8, zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ticks = _round_numbers(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.grid()
