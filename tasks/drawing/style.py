"""What all figures share: colours, type, and a drawing as bytes that depend on nothing but what was drawn.

Text stays text in the SVG (searchable, read aloud), no date and no version goes into a file, and every id carries the
drawing's name, so that several fit into one page.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 10.0
"""Inches; the page is as wide."""
GREY, LINE, LIGHT, INK = "#6b6b6b", "#9a9a9a", "#e3e3e3", "#1a1a1a"
BLUE, PALE_BLUE, ORANGE, GREEN = "#0072b2", "#8fc3e6", "#d55e00", "#009e73"
"""Okabe and Ito's colours, which people with any colour vision tell apart."""

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
styled = rc_context(_STYLE)
"""Decorator of every function that draws: matplotlib reads the style when an element is made."""
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: its name (also the file's), its description for those who do not see it, SVG and PNG."""

    name: str
    description: str
    svg: str
    png: bytes

    @property
    def inline(self) -> str:
        """The SVG as an element of an HTML page."""
        return self.svg[self.svg.index("<svg") :]


def panels(
    rows: int, columns: int, height: float, heights: Sequence[float] | None = None, *, share_y: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of the page's width and `height` inches with a grid of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ratios = {"height_ratios": heights} if heights else None
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y, gridspec_kw=ratios)
    return figure, [list(row) for row in grid]


def finish(figure: Figure, name: str, description: str, dpi: int) -> Drawing:
    """Render a figure as SVG text and as PNG with `dpi` pixels per inch."""
    with rc_context({"svg.hashsalt": name}):
        text, image = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
        figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    return Drawing(name, description, _named(text.getvalue(), name, description), image.getvalue())


def _named(svg: str, name: str, description: str) -> str:
    """Ids that start with `name`, words for those who do not see it, and a size that follows the page's.

    The words are no <title>, which browsers show wherever the pointer rests.
    """
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = svg.replace('href="#', f'href="#{name}-')
    head, _, body = svg[svg.index("<svg") :].partition(">")
    shape = re.search(r'viewBox="[^"]*"', head)
    assert shape, head
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    words = escape(description)
    return f'<svg {names} role="img" aria-label="{words}" {shape[0]}>\n<desc>{words}</desc>{body}'


def escape(text: str) -> str:
    """`text` within an element or a quoted attribute."""
    for plain, coded in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(plain, coded)
    return text


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the same order, near the given ones: labels that do not overlap.

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
