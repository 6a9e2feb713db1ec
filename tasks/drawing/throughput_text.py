"""Tokens per second of parent and child as tables for people, in the layout of the published table. No torch.

In: rows of throughput.parquet. Out: text. Measured and modelled numbers stand in separate tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap

from storage.records import ThroughputRow
from storage.scenario import Setting
from tasks.puzzle.costs.cost_table import ModelSpeed
from tasks.puzzle.costs.pairs import parent_child_pairs, ratio

SCENARIO_NAMES = {
    "128/128": "chatbot",
    "128/1024": "text generation",
    "128/2048": "long text",
    "128/4096": "reasoning",
    "2048/128": "summarisation/RAG",
    "2048/2048": "stress",
}
"""Rows of the published table (Llama-3.1-Nemotron-51B announcement): input/output tokens -> name."""


def throughput_tables(label: str, rows: Sequence[ThroughputRow], scenarios: Mapping[str, str]) -> str:
    """Format tables of measured beside predicted speeds, and of whole requests in the published layout.

    Args:
        label: name of the target for people.
        rows: the rows of throughput.parquet.
        scenarios: measured lengths -> the scenario whose lengths were scaled to them.

    Returns:
        Lines of at most 100 columns.
    """
    measured = sorted(
        (row for row in rows if row.measured_ms is not None), key=lambda row: (row.batch, row.phase != "prefill")
    )
    modelled = [row for row in rows if row.modelled_tokens_per_s is not None]
    lines: list[str] = []
    for engine in dict.fromkeys(row.engine for row in measured):
        engine_rows = [row for row in measured if row.engine == engine]
        lines += [*_measured_table(label, engine_rows), "", *_requests_table(label, engine_rows, scenarios), ""]
    return "\n".join([*lines, *_modelled_table(label, modelled), ""])


def _measured_table(label: str, rows: Sequence[ThroughputRow]) -> list[str]:
    first = rows[0]
    threads = f", {first.threads} threads" if first.threads else ""
    lines = [
        f"{label}: tokens/s MEASURED on {first.machine}",
        f"  ({first.engine}, {first.precision}{threads}, {first.versions})",
        f"{'':<24} {'measured':>23} {'child / parent':>19}",
        f"{'scenario':<10} {'phase':<8} {'batch':>4} {'parent':>11} {'child':>11} {'measured':>9} {'predicted':>9} "
        f"{'error':>7} {'spread':>7}",
    ]
    for parent, child in parent_child_pairs(rows):
        measured = ratio(child.measured_tokens_per_s, parent.measured_tokens_per_s)
        predicted = ratio(child.predicted_tokens_per_s, parent.predicted_tokens_per_s)
        spread = max(parent.measured_spread or 0.0, child.measured_spread or 0.0)
        error = f"{predicted / measured - 1:+.1%}" if predicted is not None and measured is not None else "-"
        lines.append(
            f"{parent.scenario:<10} {parent.phase:<8} {parent.batch:>5} {parent.measured_tokens_per_s:>11,.1f} "
            f"{child.measured_tokens_per_s:>11,.1f} {_shown(measured):>9} {_shown(predicted):>9} {error:>7} "
            f"{spread:>7.1%}"
        )
    return [*lines, *_notes(rows)]


def _modelled_table(label: str, rows: Sequence[ThroughputRow]) -> list[str]:
    first = rows[0]
    lines = [
        f"{label}: generated tokens/s per {first.hardware}, MODELLED, measured nowhere",
        f"  ({first.engine}, {first.precision}; the published table is FP8 on TensorRT-LLM)",
        *_heading("modelled"),
    ]
    pairs = {parent.scenario: (parent, child) for parent, child in parent_child_pairs(rows)}
    for scenario in sorted(pairs, key=rank):
        cells = [(row.modelled_tokens_per_s or 0.0, row.batch, row.tensor_parallel) for row in pairs[scenario]]
        lines.append(_published_line(scenario, scenario, *cells))
    return [*lines, *_notes(rows)]


def _requests_table(label: str, rows: Sequence[ThroughputRow], scenarios: Mapping[str, str]) -> list[str]:
    """Return lines of whole requests, from the measured phases; parent and child each at the best batch measured."""
    first = rows[0]
    lines = [
        f"{label}: generated tokens/s of whole requests per device, MEASURED ({first.engine}, {first.precision})",
        *_heading("measured"),
    ]
    best: dict[str, dict[str, tuple[float, int, int]]] = {}
    for prefill in rows:
        decode = next((row for row in rows if _of_one_request(prefill, row)), None)
        if decode and prefill.measured_ms is not None and decode.measured_ms is not None:
            speed = ModelSpeed(Setting.from_row(prefill), prefill.measured_ms, decode.measured_ms).throughput
            cell = (speed, prefill.batch, prefill.tensor_parallel)
            cells = best.setdefault(prefill.scenario, {})
            cells[prefill.model] = max(cell, cells.get(prefill.model, cell))
    names = {scenario: scenarios.get(scenario, scenario) for scenario in best}
    lines += [
        _published_line(scenario, names[scenario], best[scenario]["parent"], best[scenario]["child"])
        for scenario in sorted(best, key=lambda key: (rank(names[key]), key))
    ]
    return [
        *lines,
        *scaled_lengths(names),
        "  prefill + output length x decode step at the mean context, at the best batch that was measured",
    ]


def scaled_lengths(names: Mapping[str, str]) -> list[str]:
    """Return lines that say which lengths stand for which scenario; none where no length was scaled."""
    scaled = [f"{name} as {scenario}" for scenario, name in names.items() if name != scenario]
    if not scaled:
        return []
    return wrap(f"lengths are SCALED: {', '.join(scaled)}", 98, initial_indent="  ", subsequent_indent="    ")


def _of_one_request(prefill: ThroughputRow, decode: ThroughputRow) -> bool:
    """Tell whether two rows are the prefill and the decoding of the same requests."""
    same = (prefill.model, Setting.from_row(prefill)) == (decode.model, Setting.from_row(decode))
    return same and (prefill.phase, decode.phase) == ("prefill", "decode")


def _heading(kind: str) -> list[str]:
    """Return the heading of a table in the published layout."""
    return [
        f"{'':<28} {'parent':>25} {'child':>25} {'child / parent':>15}",
        f"{'scenario':<28} {kind:>11} {'batch':>6} {'TP':>6} {kind:>11} {'batch':>6} {'TP':>6} {kind:>15}",
    ]


def _published_line(scenario: str, name: str, parent: tuple[float, int, int], child: tuple[float, int, int]) -> str:
    """Format a line with tokens/s, batch and devices of parent and child; `name` is the scenario before scaling."""
    title = f"{SCENARIO_NAMES.get(name, '')} {scenario}".strip()
    speeds = (
        f"{speed:>11,.{1 if speed < 100 else 0}f} {batch:>6} {degree:>6}" for speed, batch, degree in (parent, child)
    )
    return f"{title:<28} {' '.join(speeds)} {_shown(ratio(child[0], parent[0])):>15}"


def parent_first(names: Iterable[str]) -> list[str]:
    """List each name once, sorted, with the parent first: the others are compared with it."""
    return sorted(set(names), key=lambda name: (name != "parent", name))


def rank(scenario: str) -> int:
    """Return the position of a scenario in the published table; other scenarios come after it."""
    order = list(SCENARIO_NAMES)
    return order.index(scenario) if scenario in order else len(order)


def _notes(rows: Sequence[ThroughputRow]) -> list[str]:
    """List notes on how the rows were measured or modelled, each once."""
    notes = dict.fromkeys(row.how for row in rows)
    return [line for how in notes for line in wrap(how, 100, initial_indent="  ", subsequent_indent="    ")]


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"
