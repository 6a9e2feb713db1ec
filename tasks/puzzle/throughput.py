"""Tokens per second of parent and child: what the cost table predicts, the modelled best batch, tables for people.

In: cost rows, the blocks of an architecture, a data sheet; rows of throughput.parquet. Out: speeds and text. No torch.
Measured and modelled numbers stand in tables of their own.
"""

from collections.abc import Iterable, Sequence
from textwrap import wrap

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.records import CostRow, Precision, Replacement, ThroughputRow
from tasks.puzzle.cost_model import ENGINE, modelled_rows
from tasks.puzzle.costs import GIB, CostTable, ModelSpeed, Setting, model_sizes, model_speed
from tasks.puzzle.hardware import DEVICES, Device

SCENARIO_NAMES = {
    "128/128": "chatbot",
    "128/1024": "text generation",
    "128/2048": "long text",
    "128/4096": "reasoning",
    "2048/128": "summarisation/RAG",
    "2048/2048": "stress",
}
"""The published table's rows (Llama-3.1-Nemotron-51B announcement): input/output tokens -> name."""

MOST_SEQUENCES = 1 << 16
"""The largest batch that is modelled: a child without any KV cache would fit in every other."""


def predict(costs: Iterable[CostRow], blocks: Sequence[Replacement], setting: Setting) -> ModelSpeed | None:
    """What the measured rows of a cost table say of a model; None where they lack one of its components."""
    try:
        return model_speed(CostTable(row for row in costs if row.origin == "measured"), blocks, setting)
    except InputError:
        return None


def best_modelled(
    config: ModelConfig, blocks: Sequence[Replacement], device: Device, precision: Precision, scenario: str
) -> tuple[ModelSpeed, str]:
    """Modelled speed at the batch with the most tokens/s among those whose weights and KV cache fit in the device.

    The KV cache counts at the end of a request (input + output tokens); activations do not count. Tried are the
    powers of 2 and the largest batch that fits: in a roofline that one is the best, since no component's time grows
    faster than the batch.

    Args:
        config: the parent.
        blocks: of the model, parent or child.
        device: the data sheet.
        precision: of weights and KV cache.
        scenario: input/output tokens.

    Returns:
        The speed (its setting has the batch), and how it was modelled.

    Raises:
        InputError: not even one sequence fits.
    """
    attentions, ffns = ({getattr(block, name) for block in blocks} for name in ("attention", "ffn"))

    def rows(batch: int) -> tuple[CostRow, ...]:
        return modelled_rows(config, sorted(attentions), sorted(ffns), device, precision, scenario, batch)

    def speed(batch: int) -> ModelSpeed:
        setting = Setting(device.name, ENGINE, precision, 1, scenario, batch)
        return model_speed(CostTable(rows(batch)), blocks, setting)

    one = speed(1).setting
    sizes = model_sizes(CostTable(rows(1)), blocks, precision)
    per_sequence = (one.input_tokens + one.output_tokens) * sizes.kv_bytes_per_token
    free = device.memory_bytes - sizes.weight_bytes
    if free < per_sequence or free < 0:
        raise InputError(
            f"a model with {sizes.weight_bytes / GIB:.2f} GiB of weights and {per_sequence / GIB:.2f} GiB of KV cache "
            f"for one sequence of {scenario} ({precision}) does not fit in {device.name}, which has "
            f"{device.memory_bytes / GIB:.2f} GiB; set benchmark_throughput.precision to a narrower one, or "
            f"benchmark_throughput.hardware to a larger device (known: {', '.join(DEVICES)})"
        )
    largest = int(min(free // per_sequence, MOST_SEQUENCES)) if per_sequence else MOST_SEQUENCES
    batches = [*(1 << power for power in range(largest.bit_length()) if 1 << power < largest), largest]
    best = max(map(speed, batches), key=lambda found: found.throughput)
    memory = f"weights and KV cache fit in {device.memory_bytes / GIB:.1f} GiB"
    return best, f"{rows(1)[0].how}; the batch of most tokens/s whose {memory}"


def throughput_tables(label: str, rows: Sequence[ThroughputRow]) -> str:
    """What was measured beside what was predicted, then the modelled device in the published table's layout.

    Args:
        label: of the target.
        rows: throughput.parquet.

    Returns:
        Lines of at most 100 columns.
    """
    measured = sorted(
        (row for row in rows if row.measured_ms is not None), key=lambda row: (row.batch, row.phase != "prefill")
    )
    modelled = [row for row in rows if row.modelled_tokens_per_s is not None]
    return "\n".join([*_measured_table(label, measured), "", *_modelled_table(label, modelled), ""])


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
    devices = f"{first.tensor_parallel} device" + "s" * (first.tensor_parallel > 1)
    lines = [
        f"{label}: generated tokens/s MODELLED for {first.hardware}, measured nowhere",
        f"  ({first.engine}, {first.precision}, {devices}; the published table is FP8 on TensorRT-LLM)",
        f"{'':<28} {'parent':>20} {'child':>20} {'child / parent':>15}",
        f"{'scenario':<28} {'modelled':>12} {'batch':>7} {'modelled':>12} {'batch':>7} {'modelled':>15}",
    ]
    order = list(SCENARIO_NAMES)
    pairs = _pairs(rows, "scenario")
    pairs.sort(key=lambda pair: order.index(pair[0].scenario) if pair[0].scenario in order else len(order))
    for parent, child in pairs:
        name = f"{SCENARIO_NAMES.get(parent.scenario, '')} {parent.scenario}".strip()
        ratio = _ratio(child.modelled_tokens_per_s, parent.modelled_tokens_per_s)
        speeds = (f"{row.modelled_tokens_per_s:>12,.0f} {row.batch:>7}" for row in (parent, child))
        lines.append(f"{name:<28} {' '.join(speeds)} {_shown(ratio):>15}")
    return [*lines, *_notes(rows)]


def _notes(rows: Sequence[ThroughputRow]) -> list[str]:
    """How the rows were had, each note once."""
    notes = dict.fromkeys(row.how for row in rows)
    return [line for how in notes for line in wrap(how, 100, initial_indent="  ", subsequent_indent="    ")]


def _ratio(child: float | None, parent: float | None) -> float | None:
    return child / parent if child is not None and parent is not None else None


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"
