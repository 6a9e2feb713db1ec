"""Tokens per second of parent and child: what the cost table predicts, a GPU's modelled best, tables for people.

In: cost rows, the blocks of an architecture, a data sheet; rows of throughput.parquet. Out: speeds and text. No torch.
Measured and modelled numbers stand in tables of their own.
"""

from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.records import CostRow, Precision, Replacement, ThroughputRow
from tasks.puzzle.costs import GIB, CostTable, ModelSpeed, Setting, model_speed
from tasks.puzzle.engine_model import TENSORRT_LLM, Estimate, Model, best_estimate
from tasks.puzzle.hardware import Device

SCENARIO_NAMES = {
    "128/128": "chatbot",
    "128/1024": "text generation",
    "128/2048": "long text",
    "128/4096": "reasoning",
    "2048/128": "summarisation/RAG",
    "2048/2048": "stress",
}
"""The published table's rows (Llama-3.1-Nemotron-51B announcement): input/output tokens -> name."""


def predict(costs: Iterable[CostRow], blocks: Sequence[Replacement], setting: Setting) -> ModelSpeed | None:
    """What the measured rows of a cost table say of a model; None where they lack one of its components."""
    try:
        return model_speed(CostTable(row for row in costs if row.origin == "measured"), blocks, setting)
    except InputError:
        return None


def best_modelled(
    config: ModelConfig, blocks: Sequence[Replacement], device: Device, precision: Precision, scenario: str
) -> tuple[Estimate, str]:
    """Modelled speed of TensorRT-LLM at the batch and number of devices with the most tokens/s per device.

    Args:
        config: the parent.
        blocks: of the model, parent or child.
        device: the data sheet.
        precision: of weights and KV cache.
        scenario: input/output tokens.

    Returns:
        The estimate, and how it was modelled.

    Raises:
        InputError: not even one sequence fits.
    """
    inputs, outputs = map(int, scenario.split("/"))
    model = Model(config, tuple((block.attention, block.ffn) for block in blocks))
    try:
        found = best_estimate(model, device, TENSORRT_LLM, precision, (inputs, outputs))
    except InputError as error:
        raise InputError(f"benchmark_throughput models {scenario} in {precision}: {error}") from None
    how = f"engine model (docs/costs.md), constants fitted {TENSORRT_LLM.fitted}; the best batch of 1, 2, 4 ... 512"
    return found, f"{how} and number of devices of 1, 2, 4, 8 that fit in {device.memory_bytes / GIB:.1f} GiB each"


def throughput_tables(label: str, rows: Sequence[ThroughputRow], scenarios: Mapping[str, str]) -> str:
    """What was measured beside what was predicted; whole requests, measured and modelled, in the published layout.

    Args:
        label: of the target.
        rows: throughput.parquet.
        scenarios: what was measured -> the scenario whose lengths were scaled to it.

    Returns:
        Lines of at most 100 columns.
    """
    measured = sorted(
        (row for row in rows if row.measured_ms is not None), key=lambda row: (row.batch, row.phase != "prefill")
    )
    modelled = [row for row in rows if row.modelled_tokens_per_s is not None]
    lines: list[str] = []
    for engine in dict.fromkeys(row.engine for row in measured):
        of_engine = [row for row in measured if row.engine == engine]
        lines += [*_measured_table(label, of_engine), "", *_requests_table(label, of_engine, scenarios), ""]
    return "\n".join([*lines, *_modelled_table(label, modelled), ""])


def _pairs(rows: Sequence[ThroughputRow], *key: str) -> list[tuple[ThroughputRow, ThroughputRow]]:
    """Parent and child of every key, in the order of the parent's rows."""
    children = {tuple(getattr(row, name) for name in key): row for row in rows if row.model == "child"}
    parents = [row for row in rows if row.model == "parent"]
    return [(row, children[tuple(getattr(row, name) for name in key)]) for row in parents]


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
    for parent, child in _pairs(rows, "scenario", "batch", "phase"):
        ratio = _ratio(child.measured_tokens_per_s, parent.measured_tokens_per_s)
        predicted = _ratio(child.predicted_tokens_per_s, parent.predicted_tokens_per_s)
        spread = max(parent.measured_spread or 0.0, child.measured_spread or 0.0)
        error = f"{predicted / ratio - 1:+.1%}" if predicted is not None and ratio is not None else "-"
        lines.append(
            f"{parent.scenario:<10} {parent.phase:<8} {parent.batch:>5} {parent.measured_tokens_per_s:>11,.1f} "
            f"{child.measured_tokens_per_s:>11,.1f} {_shown(ratio):>9} {_shown(predicted):>9} {error:>7} {spread:>7.1%}"
        )
    return [*lines, *_notes(rows)]


def _modelled_table(label: str, rows: Sequence[ThroughputRow]) -> list[str]:
    first = rows[0]
    lines = [
        f"{label}: generated tokens/s per {first.hardware}, MODELLED, measured nowhere",
        f"  ({first.engine}, {first.precision}; the published table is FP8 on TensorRT-LLM)",
        *_heading("modelled"),
    ]
    pairs = {parent.scenario: (parent, child) for parent, child in _pairs(rows, "scenario")}
    for scenario in sorted(pairs, key=rank):
        cells = [(row.modelled_tokens_per_s or 0.0, row.batch, row.tensor_parallel) for row in pairs[scenario]]
        lines.append(_published_line(scenario, scenario, *cells))
    return [*lines, *_notes(rows)]


def _requests_table(label: str, rows: Sequence[ThroughputRow], scenarios: Mapping[str, str]) -> list[str]:
    """Whole requests from the measured phases, parent and child each at its best batch that was measured."""
    first = rows[0]
    lines = [
        f"{label}: generated tokens/s of whole requests per device, MEASURED ({first.engine}, {first.precision})",
        *_heading("measured"),
    ]
    best: dict[str, dict[str, tuple[float, int, int]]] = {}
    for prefill in rows:
        decode = next((row for row in rows if _of_one_request(prefill, row)), None)
        if decode and prefill.measured_ms is not None and decode.measured_ms is not None:
            speed = ModelSpeed(Setting.of(prefill), prefill.measured_ms, decode.measured_ms).throughput
            cell = (speed, prefill.batch, prefill.tensor_parallel)
            of_models = best.setdefault(prefill.scenario, {})
            of_models[prefill.model] = max(cell, of_models.get(prefill.model, cell))
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
    """Which lengths stand for which scenario, as lines; none where no length was scaled."""
    scaled = [f"{name} as {scenario}" for scenario, name in names.items() if name != scenario]
    return (
        wrap(f"lengths are SCALED: {', '.join(scaled)}", 98, initial_indent="  ", subsequent_indent="    ")
        if scaled
        else []
    )


def _of_one_request(prefill: ThroughputRow, decode: ThroughputRow) -> bool:
    same = (prefill.model, Setting.of(prefill)) == (decode.model, Setting.of(decode))
    return same and (prefill.phase, decode.phase) == ("prefill", "decode")


def _heading(kind: str) -> list[str]:
    """Of a table in the published layout."""
    return [
        f"{'':<28} {'parent':>25} {'child':>25} {'child / parent':>15}",
        f"{'scenario':<28} {kind:>11} {'batch':>6} {'TP':>6} {kind:>11} {'batch':>6} {'TP':>6} {kind:>15}",
    ]


def _published_line(scenario: str, name: str, parent: tuple[float, int, int], child: tuple[float, int, int]) -> str:
    """A scenario with tokens/s, batch and devices of parent and child; `name` is what it is called by."""
    title = f"{SCENARIO_NAMES.get(name, '')} {scenario}".strip()
    speeds = (
        f"{speed:>11,.{1 if speed < 100 else 0}f} {batch:>6} {degree:>6}" for speed, batch, degree in (parent, child)
    )
    return f"{title:<28} {' '.join(speeds)} {_shown(_ratio(child[0], parent[0])):>15}"


def parent_first(names: Iterable[str]) -> list[str]:
    """Each name once, in order, but the parent before all others: what they are compared with."""
    return sorted(set(names), key=lambda name: (name != "parent", name))


def rank(scenario: str) -> int:
    """Where a scenario stands in the published table; others come after it."""
    order = list(SCENARIO_NAMES)
    return order.index(scenario) if scenario in order else len(order)


def _notes(rows: Sequence[ThroughputRow]) -> list[str]:
    """How the rows were had, each note once."""
    notes = dict.fromkeys(row.how for row in rows)
    return [line for how in notes for line in wrap(how, 100, initial_indent="  ", subsequent_indent="    ")]


def _ratio(child: float | None, parent: float | None) -> float | None:
    return child / parent if child is not None and parent is not None else None


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"
