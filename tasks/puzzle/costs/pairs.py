"""Rows of throughput.parquet in pairs of parent and child, and the ratio of their values. No torch."""

from collections.abc import Iterable

from storage.records import ThroughputRow

Pair = tuple[ThroughputRow, ThroughputRow]
"""The parent's row and the child's row of the same setting and phase."""


def parent_child_pairs(rows: Iterable[ThroughputRow]) -> list[Pair]:
    """Pair the rows of parent and child, in the order of the parent's; rows without a partner are left out.

    Modelled rows have a batch and a number of devices of their own, the best ones of each model, and are paired by the
    rest of the setting.
    """
    rows = list(rows)
    children = {_position(row): row for row in rows if row.model == "child"}
    parents = [row for row in rows if row.model == "parent" and _position(row) in children]
    return [(parent, children[_position(parent)]) for parent in parents]


def _position(row: ThroughputRow) -> tuple[object, ...]:
    """Return the columns in which the rows of a pair are equal."""
    operation = (row.batch, row.tensor_parallel) if row.modelled_tokens_per_s is None else None
    return row.hardware, row.engine, row.precision, row.phase, row.scenario, operation


def ratio(value: float | None, divisor: float | None) -> float | None:
    """Divide a value by another; None where one of them is missing or the divisor is 0."""
    return value / divisor if value is not None and divisor else None
