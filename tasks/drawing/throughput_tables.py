"""The report's tables of tokens/s, parent beside child: measured ones, and in tables of their own modelled ones."""

from collections.abc import Sequence

from tasks.drawing.numbers import NONE
from tasks.drawing.reported_child import ReportedChild
from tasks.drawing.tables import Table, percent, times
from tasks.drawing.throughput_text import rank
from tasks.puzzle.costs.pairs import Pair, parent_child_pairs, ratio


def measured_throughput(child: ReportedChild) -> list[Table]:
    """Tabulate tokens/s of parent and child on one machine, as measured and as the cost table predicts, per engine."""
    pairs = parent_child_pairs(row for row in child.throughput if row.modelled_tokens_per_s is None)
    by_engine: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_engine.setdefault(pair[1].engine, []).append(pair)
    return [_measured_table(child.label, of_engine) for of_engine in by_engine.values()]


def _measured_table(label: str, pairs: Sequence[Pair]) -> Table:
    rows = [
        (
            child.phase,
            child.scenario,
            str(child.batch),
            _tokens(parent.measured_tokens_per_s),
            _tokens(child.measured_tokens_per_s),
            times(ratio(child.measured_tokens_per_s, parent.measured_tokens_per_s)),
            percent(max(parent.measured_spread or 0.0, child.measured_spread or 0.0)),
            _tokens(parent.predicted_tokens_per_s),
            _tokens(child.predicted_tokens_per_s),
            times(ratio(child.predicted_tokens_per_s, parent.predicted_tokens_per_s)),
        )
        for parent, child in pairs
    ]
    columns = (
        *("phase", "scenario", "batch", "parent, measured", "child, measured", "ratio, measured", "spread"),
        *("parent, predicted", "child, predicted", "ratio, predicted"),
    )
    _, first = pairs[0]
    threads = f", {first.threads} thread{'s' * (first.threads > 1)}" if first.threads else ""
    timed = next((child.predicted_hardware for _, child in pairs if child.predicted_hardware), None)
    tables = f"; predicted from the timings of {timed}" if timed else ""
    machine = f"{first.machine}; {first.engine}, {first.precision}{threads}; {first.versions}{tables}"
    return Table(f"{label}: tokens/s, measured on {machine}", columns, rows, num_words=2)


def modelled_throughput(child: ReportedChild) -> Table | None:
    """Tabulate tokens/s of parent and child on hardware that was modelled, none of it measured; None without any."""
    pairs = parent_child_pairs(row for row in child.throughput if row.modelled_tokens_per_s is not None)
    if not pairs:
        return None
    pairs.sort(key=lambda pair: rank(pair[0].scenario))
    rows = [
        (
            modelled.scenario,
            f"{parent.batch}, {parent.tensor_parallel}",
            f"{modelled.batch}, {modelled.tensor_parallel}",
            _tokens(parent.modelled_tokens_per_s),
            _tokens(modelled.modelled_tokens_per_s),
            times(ratio(modelled.modelled_tokens_per_s, parent.modelled_tokens_per_s)),
        )
        for parent, modelled in pairs
    ]
    columns = (
        *("scenario", "parent's batch, devices", "child's batch, devices"),
        *("parent, modelled", "child, modelled", "ratio, modelled"),
    )
    _, first = pairs[0]
    caption = (
        f"{child.label}: generated tokens/s per device, modelled for {first.hardware} ({first.engine}, "
        f"{first.precision}), not measured"
    )
    return Table(caption, columns, rows)


def _tokens(rate: float | None) -> str:
    return NONE if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
