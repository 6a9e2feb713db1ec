"""Tokens/s of a server against tokens/s of each of its users (the announcement's figure 4).

In: rows of serving.parquet. Out: a drawing.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes

from storage.records import ServingRow
from tasks.drawing.style import BLUE, GREEN, GREY, ORANGE, Drawing, finish, legend_name, panels, styled
from tasks.drawing.throughput_text import parent_first, rank

_COLUMNS = 3
_COLOURS = (GREY, BLUE, ORANGE, GREEN)


@styled
def draw_serving(rows: Sequence[ServingRow], dpi: int) -> Drawing:
    """Draw a panel per workload, a line per server, a point per concurrency (its label); all of it is measured.

    Args:
        rows: the rows of serving.parquet.
        dpi: pixels per inch of the PNG.
    """
    works = sorted({row.comparison_key for row in rows}, key=lambda work: (rank(work[0]), work))
    names = parent_first(row.name for row in rows)
    across = min(_COLUMNS, len(works))
    down = -(-len(works) // across)
    figure, grid = panels(down, across, 3.4 * down)
    cells = [axes for line in grid for axes in line]
    words = []
    for axes, work in zip(cells, works, strict=False):
        for number, name in enumerate(names):
            shown = [row for row in rows if (row.name, row.comparison_key) == (name, work)]
            words += _line(axes, name, shown, _COLOURS[number % len(_COLOURS)])
        scenario, inputs, outputs, prompt_kind = work
        sent = "" if f"{inputs}/{outputs}" == scenario else f", sent as {inputs}/{outputs}"
        sent += ", text prompts" if prompt_kind == "text" else ""
        axes.set(xlabel="tokens/s per user, measured", ylabel="tokens/s per device, measured")
        axes.set_title(f"{scenario}{sent}")
        axes.margins(0.1)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid()
        axes.legend(loc="best")
    for axes in cells[len(works) :]:
        axes.set_axis_off()
    title = (
        "Generated tokens/s of a server's device, and of one user, at the concurrencies that stand beside the points"
    )
    return finish(figure, "serving", f"{title}. {'; '.join(words)}", dpi)


def _line(axes: Axes, name: str, rows: Sequence[ServingRow], colour: str) -> list[str]:
    """Draw one server's line of a panel; returns its points in words."""
    points = sorted(
        (row.concurrency, row.measured_user_tokens_per_s, row.measured_tokens_per_s / row.devices)
        for row in rows
        if row.measured_user_tokens_per_s is not None and row.measured_tokens_per_s is not None
    )
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], ".-", color=colour, label=legend_name(name))
    words = []
    for concurrency, x, y in points:
        axes.annotate(str(concurrency), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        words.append(f"{name}, {rows[0].scenario}, {concurrency} at once: {y:.4g} of {x:.4g}")
    return words
