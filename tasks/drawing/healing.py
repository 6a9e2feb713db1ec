"""A child on its way from assembled over refined to distilled: KL to the parent and perplexity, by domain.

In: the child's quality in each state on the text of each domain. Out: a drawing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from storage.evaluation import CHILD_STATES, ChildState, Quality
from tasks.drawing.style import BLUE, GREEN, GREY, INK, LINE, ORANGE, Drawing, finish, legend_name, panels, styled

_COLOURS = (BLUE, ORANGE, GREEN, GREY)
"""Colours of domains, in their order; they begin anew behind the last."""


@dataclass(frozen=True)
class HealedChild:
    """A target's child: its name for people, and by domain the quality of each state and the parent's perplexity."""

    label: str
    domains: Mapping[str, tuple[Mapping[ChildState, Quality], float]]


@styled
def healing(children: Sequence[HealedChild], dpi: int) -> Drawing:
    """Draw KL to the parent (upper row) and perplexity over the parent's (lower row) in each state of each child."""
    figure, grid = panels(2, len(children), 5.6, share_y=False)
    words = []
    for column, child in enumerate(children):
        upper, lower = grid[0][column], grid[1][column]
        for position, (domain, (states, parent_perplexity)) in enumerate(child.domains.items()):
            colour = _COLOURS[position % len(_COLOURS)]
            kls = [states[name].kl for name in CHILD_STATES]
            ratios = [states[name].perplexity / parent_perplexity for name in CHILD_STATES]
            errors = [states[name].kl_stderr or 0.0 for name in CHILD_STATES]
            upper.errorbar(range(len(kls)), kls, yerr=errors, fmt="o-", color=colour, label=legend_name(domain))
            lower.plot(range(len(ratios)), ratios, "o-", color=colour)
            _numbers(upper, [f"{kl:.3f}" for kl in kls], kls)
            _numbers(lower, [f"{ratio:.2f}" for ratio in ratios], ratios)
            steps = zip(CHILD_STATES, kls, ratios, strict=True)
            states_text = ", ".join(f"{name} KL {kl:.3f} (perplexity {ratio:.2f} times)" for name, kl, ratio in steps)
            words.append(f"{child.label} on {domain} text: {states_text}")
        upper.set_title(child.label)
        lower.axhline(1.0, color=LINE, linewidth=0.8, zorder=0)
    for position, row in enumerate(grid):
        _finish_row(row, 0.0 if position == 0 else 1.0)
    grid[0][0].set_ylabel("KL(parent || child), nats/token\n(± standard error)")
    grid[1][0].set_ylabel("perplexity ÷ the parent's")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=4, title="held-out text")
    return finish(figure, "healing", f"From assembled to distilled, measured. {'; '.join(words)}", dpi)


def _numbers(axes: Axes, texts: Sequence[str], heights: Sequence[float]) -> None:
    """Write a text beside the point at each height."""
    for position, (text, height) in enumerate(zip(texts, heights, strict=True)):
        axes.annotate(text, (position, height), (7, 4), textcoords="offset points", fontsize=8, color=INK)


def _finish_row(row: Sequence[Axes], low: float) -> None:
    """Give the panels of a row one scale from `low`, and the states as its ticks."""
    high = max(axes.get_ylim()[1] for axes in row)
    for axes in row:
        axes.set_ylim(low - 0.04 * (high - low), high + 0.06 * (high - low))
        axes.set_xticks(range(len(CHILD_STATES)), CHILD_STATES)
        axes.set_xlim(-0.25, len(CHILD_STATES) - 0.6)
        axes.grid(axis="y")
