"""Whole blocks removed one after the other: which removals a step tries, and what was measured of them. No torch.

In: rows of scores.parquet. Out: the blocks in the order in which the KL of what remains grows least. A step's rows are
`around` the parent without the blocks that went before, so that their KL is that of all removals together: errors of
neighbours feed on each other, and sums of replace-1-block scores do not see it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from storage.records import ScoreRow
from storage.variants import Architecture, Attention, Ffn, Replacement

MOST_REMOVED = 0.5
"""Share of the parent's blocks that are removed; the rest is left to the scores of single blocks."""
CANDIDATES = 4
"""Blocks that a step tries: those with the least scores. Ten find the same nine first (docs/scores.md)."""


def removal(block_index: int) -> Replacement:
    """Return the replacement that removes a whole block."""
    return Replacement(block_index, 1, Attention("no_op"), Ffn("no_op"))


def without(parent: Sequence[Replacement], removed: Iterable[int]) -> Architecture:
    """Return the parent without some of its blocks."""
    removed = set(removed)
    return Architecture(
        tuple(removal(block.first_block) if block.first_block in removed else block for block in parent)
    )


def candidates(scores: Mapping[int, float], removed: Sequence[int]) -> list[int]:
    """Return the blocks that the next step tries, in the parent's order; `scores` are of removing each block alone."""
    remaining = sorted((score, block) for block, score in scores.items() if block not in removed)
    return sorted(block for _, block in remaining[:CANDIDATES])


def removal_order(rows: Iterable[ScoreRow], parent: Sequence[Replacement]) -> tuple[int, ...]:
    """Return the blocks in the order of their removal, as far as rows go; ties go to the earlier block."""
    measured: defaultdict[str, defaultdict[int, list[ScoreRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.replacement == removal(row.first_block):
            measured[row.around][row.first_block].append(row)
    order: list[int] = []
    while step := measured.get(without(parent, order).digest):
        order.append(min(step, key=lambda block: (_mean_kl(step[block]), block)))
    return tuple(order)


def _mean_kl(rows: Sequence[ScoreRow]) -> float:
    return math.fsum(row.tokens * row.kl for row in rows) / sum(row.tokens for row in rows)
