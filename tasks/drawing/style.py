"""The common part of all figures: colours, type, and rendering to bytes that depend on the figure's content alone.

Text stays text in the SVG (searchable, read aloud), a file has no date and no version, and every id begins with the
drawing's name, so that several fit into one page.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import category

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

WIDTH = 10.0
"""Width of every figure and of the page, inches."""
GREY, LINE, LIGHT, INK = "#6b6b6b", "#9a9a9a", "#e3e3e3", "#1a1a1a"
BLUE, PALE_BLUE, ORANGE, GREEN = "#0072b2", "#8fc3e6", "#d55e00", "#009e73"
"""Colours of Okabe and Ito, which people with any colour vision tell apart."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
}
_ALL: dict[Any, Any] = {**{name: value for name, value in rcParamsDefault.items() if name != "backend"}, **_STYLE}
"""Every setting, so that a matplotlibrc of the user's or the machine's changes no figure."""
styled = rc_context(_ALL)
"""Decorator of every function that draws, since matplotlib reads the style when an element is made."""
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: its name (also the file's), its description for readers who do not see it, SVG and PNG."""

    name: str
    description: str
    svg: str
    png: bytes

    @property
    def inline(self) -> str:
        """Return the SVG as an element of an HTML page."""
        return self.svg[self.svg.index("<svg") :]


def panels(
    rows: int, columns: int, height: float, heights: Sequence[float] | None = None, *, share_y: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure of the page's width and `height` inches with a grid of axes; `heights` are ratios of its rows."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ratios = {"height_ratios": heights} if heights else None
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y, gridspec_kw=ratios)
    return figure, [list(row) for row in grid]


def finish(figure: Figure, name: str, description: str, dpi: int) -> Drawing:
    """Render a figure as SVG text and as PNG with `dpi` pixels per inch; people's texts are drawn as written."""
    _take_literally(figure)
    with rc_context({"svg.hashsalt": name}):
        text, image = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
        figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return Drawing(name, description, _named(text.getvalue(), name, description), image.getvalue())


def _take_literally(figure: Figure) -> None:
    """No text is a formula, whatever signs it has, except for the powers of ten beside logarithmic axes."""
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels(which="both")
    }
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in ticks:
            text.set_parse_math(False)
            text.set_text(printable(text.get_text()))


def printable(text: str) -> str:
    """Return text that XML can hold: a mark takes the place of control characters, line ends aside."""
    return "".join("\ufffd" if category(sign) in ("Cc", "Cs") and sign != "\n" else sign for sign in text)


def legend_name(name: str) -> str:
    """Return a name as a label of a legend, which leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _named(svg: str, name: str, description: str) -> str:
    """Give ids the prefix `name`, add the description in words, and let the size follow the page's.

    The description is no <title>, which browsers show wherever the pointer rests.
    """
    svg = re.sub("<[^>]*>", lambda tag: re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag[0]), svg)
    head, _, body = svg[svg.index("<svg") :].partition(">")
    shape = re.search(r'viewBox="[^"]*"', head)
    assert shape, head
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    words = escape(printable(description))
    return f'<svg {names} role="img" aria-label="{words}" {shape[0]}>\n<desc>{words}</desc>{body}'


def escape(text: str) -> str:
    """Escape `text` for an element or a quoted attribute."""
    for plain, coded in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(plain, coded)
    return text


def spaced_apart(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions at least `gap` apart, in the same order and near the given ones, so that labels do not overlap.

    Neighbours that are too close form a run around their mean, and runs that meet join.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    runs: list[list[int]] = []
    for index in order:
        runs.append([index])
        while len(runs) > 1 and _start(runs[-1], positions, gap) < _start(runs[-2], positions, gap) + gap * len(
            runs[-2]
        ):
            runs[-2:] = [runs[-2] + runs[-1]]
    placed = [0.0] * len(positions)
    for run in runs:
        for rank, index in enumerate(run):
            placed[index] = _start(run, positions, gap) + gap * rank
    return placed


def _start(run: Sequence[int], positions: Sequence[float], gap: float) -> float:
    return sum(positions[index] for index in run) / len(run) - gap * (len(run) - 1) / 2
