"""The heat map of replace-1-block scores: how much quality each variant of each block costs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LogNorm

from tasks.drawing.style import Drawing, finish, panels, styled


@dataclass(frozen=True)
class ScoreCell:
    """Score, nats/token, of the variant that `row` names in place of parent blocks from `first_block`."""

    row: str
    first_block: int
    score: float


@styled
def score_map(cells: Sequence[ScoreCell], num_blocks: int, dpi: int) -> Drawing:
    """Draw variants down, blocks across, colour = KL with that one block replaced; cells without a score are blank."""
    rows = list(dict.fromkeys(cell.row for cell in cells))
    values = np.full((len(rows), num_blocks), np.nan)
    for cell in cells:
        values[rows.index(cell.row), cell.first_block] = cell.score
    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-3, 1.0)
    figure, ((axes,),) = panels(1, 1, 1.2 + 0.26 * len(rows))
    norm = LogNorm(low, max(high, low * 1.01), clip=True)
    image = axes.pcolormesh(np.maximum(values, low), cmap="viridis_r", norm=norm, edgecolors="white", linewidth=0.4)
    axes.set_yticks([index + 0.5 for index in range(len(rows))], rows)
    step = max(1, num_blocks // 15)
    axes.set_xticks([index + 0.5 for index in range(0, num_blocks, step)], [str(i) for i in range(0, num_blocks, step)])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("first parent block that is replaced")
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=18)
    bar.set_label("KL, nats/token (log scale)")
    worst = max(cells, key=lambda cell: cell.score)
    description = (
        f"Replace-1-block scores of {len(cells)} replacements, {low:.2g} to {high:.2g} nats/token; "
        f"the worst is {worst.row} in block {worst.first_block}"
    )
    return finish(figure, "scores", description, dpi)
