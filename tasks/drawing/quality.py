"""Quality against throughput, and what the tables predicted against what was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.drawing.style import BLUE, GREY, INK, LINE, ORANGE, PALE_BLUE, Drawing, finish, panels, spread, styled

Series = Literal["parent", "assembled", "distilled", "baseline"]
_LOOKS: dict[Series, tuple[str, str, str]] = {
    "parent": ("parent", GREY, "D"),
    "assembled": ("child before GKD", PALE_BLUE, "o"),
    "distilled": ("child after GKD", BLUE, "o"),
    "baseline": ("baseline, before GKD", ORANGE, "s"),
}
_GAP = 0.05
"""Least distance of labels, as a share of the axes' height."""


@dataclass(frozen=True)
class Point:
    """A model: KL to the parent (nats/token, measured, with its standard error) and throughput over the parent's.

    `how` says whether the throughput was measured or predicted from tables; a None there means that there is none.
    `score` is the predicted KL (nats/token), None where nothing was predicted.
    """

    name: str
    series: Series
    kl: float
    kl_stderr: float
    measured_ratio: float | None = None
    predicted_ratio: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Panel:
    """One target's models; `where` says what throughput and on which machine, `tables` what its predictions rest on."""

    label: str
    where: str
    tables: str
    points: Sequence[Point]


@styled
def quality_throughput(targets: Sequence[Panel], dpi: int) -> Drawing:
    """KL to the parent over relative throughput: filled markers were timed, hollow ones follow from the tables."""
    figure, (row,) = panels(1, len(targets), 4.6, share_y=True)
    for axes, target in zip(row, targets, strict=True):
        _frontier(axes, target)
    row[0].set_ylabel("KL(parent || model), nats/token, measured\n(± standard error; lower is better)")
    linear = _linear_below([point.kl for target in targets for point in target.points])
    top = max(point.kl + point.kl_stderr for target in targets for point in target.points)
    row[0].set_yscale("symlog", linthresh=linear, linscale=0.35)
    row[0].set_ylim(-0.12 * linear, max(top, linear) * 1.5)
    ticks = [0.0, *_round_numbers(linear, top * 1.5)]
    row[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    for axes in row:
        axes.minorticks_off()
    for axes, target in zip(row, targets, strict=True):
        _label(axes, target.points)
    _legend(figure, row)
    words = [
        f"{target.label}: " + ", ".join(f"{point.name} KL {point.kl:.3f}" for point in target.points)
        for target in targets
    ]
    return finish(figure, "quality_throughput", f"Quality against throughput. {'. '.join(words)}", dpi)


def _frontier(axes: Axes, target: Panel) -> None:
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
    axes.set_title(target.label)
    axes.set_xlabel(
        f"throughput ÷ the parent's: {target.where}\n(filled: measured; hollow:\npredicted from {target.tables})"
    )


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Names and KL in a column at the right, as high as their points or a little apart, each with a thread to it."""
    shown = [(ratio, point) for point in points if (ratio := point.measured_ratio or point.predicted_ratio) is not None]
    heights = [_height(axes, point.kl) for _, point in shown]
    for (ratio, point), level in zip(shown, spread(heights, _GAP), strict=True):
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
    """Where a KL lies on the axis, 0 at the bottom and 1 at the top."""
    low, high, at = (float(axes.yaxis.get_transform().transform(value)) for value in (*axes.get_ylim(), kl))
    return (at - low) / (high - low)


def _legend(figure: Figure, row: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    found: dict[str, Artist] = {}
    for axes in row:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=3, fontsize=8)


def _linear_below(values: Sequence[float]) -> float:
    """Where the axis turns from linear to logarithmic: a round number below the smallest KL that is not rounding."""
    smallest = min((value for value in values if value > 1e-3), default=0.1)
    return _round_numbers(10.0 ** math.floor(math.log10(smallest)), smallest)[-1]


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... (times powers of ten) from `low` to `high`."""
    found, power = [], 10.0 ** math.floor(math.log10(low))
    while power <= high:
        found += [round(factor * power, 12) for factor in (1, 2, 5)]
        power *= 10
    return [number for number in found if low <= number <= high]


@dataclass(frozen=True)
class Speed:
    """Tokens/s of one model in one setting: predicted by the tables, measured."""

    name: str
    predicted: float
    measured: float


@styled
def predicted_measured(targets: Sequence[Panel], speeds: Sequence[Speed], dpi: int) -> Drawing:
    """Left: sum of scores against the KL of models without GKD. Right: tokens/s by the tables against the clock's."""
    figure, (row,) = panels(1, 2, 4.2)
    points = [(target.label, point) for target in targets for point in target.points if point.score is not None]
    for (_, point), marker in zip(points, _markers(points), strict=True):
        _, colour, _ = _LOOKS[point.series]
        row[0].errorbar(point.score or 0.0, point.kl, yerr=point.kl_stderr, fmt=marker, color=colour, markersize=6)
    _diagonal(row[0], [value for _, point in points for value in (point.score or 0.0, point.kl)])
    row[0].set_title("Quality")
    row[0].set(xlabel="predicted: sum of replace-1-block scores, nats/token", ylabel="measured: KL, nats/token")
    _key(row[0], points)
    for name, marker, colour in (("parent", "D", GREY), ("child", "o", BLUE)):
        own = [speed for speed in speeds if speed.name == name]
        row[1].plot(
            [speed.predicted for speed in own],
            [speed.measured for speed in own],
            marker,
            color=colour,
            label=name,
            alpha=0.8,
        )
    _diagonal(row[1], [value for speed in speeds for value in (speed.predicted, speed.measured)])
    row[1].set_title("Speed")
    row[1].set(xlabel="predicted from the cost table, tokens/s", ylabel="measured, tokens/s")
    if speeds:
        row[1].legend(loc="upper left")
    else:
        row[1].text(0.5, 0.5, "not measured in this run", transform=row[1].transAxes, ha="center", color=GREY)
    words = [f"{label} {point.name}: predicted {point.score:.3f}, measured {point.kl:.3f}" for label, point in points]
    return finish(figure, "predicted_measured", f"Predicted against measured. {'; '.join(words)}", dpi)


def _markers(points: Sequence[tuple[str, Point]]) -> list[str]:
    """A marker per target, the same for all of its models."""
    labels = list(dict.fromkeys(label for label, _ in points))
    return ["os^vDP"[labels.index(label) % 6] for label, _ in points]


def _key(axes: Axes, points: Sequence[tuple[str, Point]]) -> None:
    """Legend: a marker per target, a colour per kind of model."""
    for label, marker in {label: marker for (label, _), marker in zip(points, _markers(points), strict=True)}.items():
        axes.plot([], [], marker, color=GREY, label=label)
    for series in dict.fromkeys(point.series for _, point in points):
        word, colour, _ = _LOOKS[series]
        axes.plot([], [], "s", color=colour, markersize=9, label=word)
    axes.legend(loc="upper left", fontsize=8)


def _diagonal(axes: Axes, values: Sequence[float]) -> None:
    """Where prediction and measurement agree, on logarithmic axes of the same range."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.4, max(positive) * 1.4
    axes.plot((low, high), (low, high), color=LINE, linewidth=0.8, zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ticks = _round_numbers(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.grid()
