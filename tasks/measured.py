"""What was measured of a child, in the units of limits: sizes counted on tensors, speeds of benchmark_throughput."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.checkpoints import Checkpoint
from storage.model_config import EMBEDDING, ModelConfig
from storage.records import Attention, ThroughputRow
from storage.targets import SPEED_METRICS
from tasks.puzzle.costs import ModelSizes, ModelSpeed, Setting


@dataclass(frozen=True)
class Counted:
    """Sizes of a checkpoint, counted on tensors; `looked_up_bytes`: an untied embedding, of which a step reads rows."""

    sizes: ModelSizes
    attention_blocks: int
    looked_up_bytes: int


def speed_ratios(rows: Sequence[ThroughputRow], counted: Mapping[str, Counted]) -> Iterator[dict[str, Any]]:
    """Child over parent at every setting that benchmark_throughput measured: measured, predicted, and for decode what
    the bytes that a step reads would allow (weights with the head, KV cache at the mean context); `drift` is the
    parent's speed as measured here over what the timings in git predict, 1 on the machine that they are of.
    """
    children = {_at(row): row for row in rows if row.model == "child"}
    for parent in rows:
        child = children.get(_at(parent))
        if parent.model != "parent" or child is None or parent.measured_ms is None:
            continue
        read = [_read_bytes(parent, counted[name]) for name in ("parent", "assembled")]
        yield {
            **{name: getattr(parent, name) for name in ("engine", "precision", "scenario", "batch", "phase")},
            "measured": _over(child.measured_tokens_per_s, parent.measured_tokens_per_s),
            "measured_spread": max(parent.measured_spread or 0.0, child.measured_spread or 0.0),
            "predicted": _over(child.predicted_tokens_per_s, parent.predicted_tokens_per_s),
            "drift": _over(parent.measured_tokens_per_s, parent.predicted_tokens_per_s),
            "read_bytes": read[0] / read[1] if parent.phase == "decode" else None,
        }


def _at(row: ThroughputRow) -> tuple[object, ...]:
    return row.engine, row.precision, row.scenario, row.batch, row.phase, row.measured_ms is None


def _over(child: float | None, parent: float | None) -> float | None:
    return child / parent if child is not None and parent is not None else None


def _read_bytes(row: ThroughputRow, counted: Counted) -> float:
    """Of a decode step at the mean context, in the checkpoint's precision."""
    inputs, outputs = map(int, row.scenario.split("/"))
    cached = row.batch * (inputs + outputs / 2) * counted.sizes.kv_bytes_per_token
    return counted.sizes.weight_bytes - counted.looked_up_bytes + cached


def speed_at(limit: Mapping[str, Any], rows: Sequence[ThroughputRow]) -> dict[str, Any] | None:
    """What benchmark_throughput measured of parent and child where a speed limit holds: medians in ms and tokens/s.

    Returns:
        None where that was not measured: another engine, several devices, or a mix of scenarios.
    """
    at = (limit["engine"], limit["scenario"], limit["batch"], limit["tensor_parallel"])
    found = {
        (row.model, row.phase): row
        for row in rows
        if row.measured_ms is not None and (row.engine, row.scenario, row.batch, row.tensor_parallel) == at
    }
    if not found or "mix" in limit:
        return None
    one = found["parent", "decode"]
    result: dict[str, Any] = {
        "hardware": limit["hardware"],
        "machine": one.machine,
        "is_timed_machine": one.hardware == limit["hardware"],
        "engine": one.engine,
        "precision": one.precision,
        "scenario": one.scenario,
        "batch": one.batch,
        "origin": "measured",
    }
    for name, model in (("parent", "parent"), ("assembled", "child")):
        prefill, decode = (found[model, phase].measured_ms for phase in ("prefill", "decode"))
        assert prefill is not None
        assert decode is not None
        speed = ModelSpeed(Setting.of(one), prefill, decode)
        result[name] = {
            "prefill_ms": prefill,
            "decode_ms": decode,
            "throughput": speed.throughput,
            "decode_throughput": speed.decode_throughput,
            "latency_ms": speed.latency_ms,
            "time_to_first_token_ms": prefill,
            "time_per_token_ms": decode,
        }
    return result


def count(checkpoint: Checkpoint, config: ModelConfig, attentions: Sequence[Attention]) -> Counted:
    params = block_params = weight_bytes = 0
    for name in checkpoint.files:
        tensor = checkpoint.tensor(name)
        params += tensor.numel()
        weight_bytes += tensor.numel() * tensor.element_size()
        block_params += tensor.numel() * name.startswith("model.layers.")
    element = checkpoint.tensor(EMBEDDING).element_size()
    kv_bytes = 2 * sum(attention.num_kv_heads for attention in attentions) * config.head_dim * element
    return Counted(
        ModelSizes(params, block_params, weight_bytes, kv_bytes),
        sum(one.kind == "gqa" for one in attentions),
        0 if config.tie_embeddings else element * config.vocab_size * config.hidden_size,
    )


def measured(limit: Mapping[str, Any], counted: dict[str, Counted], rows: Sequence[ThroughputRow]) -> float | None:
    """A limit's value on the assembled child in the limit's unit, None where it cannot be had on this machine.

    A limit that counts a workspace has none: the workspace is modelled.
    """
    if limit.get("workspace_gib"):
        return None
    if limit["metric"] in SPEED_METRICS:
        speed = speed_at(limit, rows)
        if speed is None:
            return None
        values = {name: float(speed[name][limit["metric"]]) for name in counted}
    else:
        values = {name: _size(limit, one) for name, one in counted.items()}
    return values["assembled"] / values["parent"] if limit["relative"] else values["assembled"]


def _size(limit: Mapping[str, Any], counted: Counted) -> float:
    sizes = counted.sizes
    match limit["metric"]:
        case "params":
            return sizes.params
        case "block_params":
            return sizes.block_params
        case "attention_blocks":
            return counted.attention_blocks
        case "weight_bytes":
            return sizes.weight_bytes
        case "kv_bytes":
            return sizes.kv_bytes_per_token
        case _:
            return sizes.memory_gib(limit["batch"], limit["context"], limit["tensor_parallel"])
