"""evaluate_child: quality and speed of parent and child, measured, beside what the tables predicted.

Out: children/<target>/evaluation.json (for people and the report) and evaluation.parquet (a row per model and
sequence, for paired comparisons).
"""

import statistics
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage.activations import BoundaryReader
from storage.checkpoints import Checkpoint, read_blocks
from storage.corpus import read_sequences
from storage.files import read_json, write_json, write_whole
from storage.model_config import EMBEDDING, ModelConfig
from storage.params import SPEED_METRICS, Constraint, Params
from storage.parent import Parent
from storage.paths import Paths
from tasks.puzzle.boundaries import boundaries
from tasks.puzzle.costs import ModelSizes, ModelSpeed, Setting
from tasks.puzzle.device import Compute, compute
from tasks.puzzle.evaluation import SequenceQuality, per_sequence, summarise
from tasks.puzzle.head import Head, compare_with_parent
from tasks.puzzle.timing import ENGINE, Workload, machine, time_models
from tasks.speed import is_timed_machine, parent_and_child

Models = dict[str, list[SequenceQuality]]


def plan_batches(params: Params) -> list[range]:
    """Validation sequences of each batch."""
    count = params.evaluate_child.tokens // params.prepare_corpus.seq_len
    size = params.evaluate_child.sequences_per_batch
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@task(cache_policy=NO_CACHE)
def measure_quality(sequences: range, target: str, params: Params, paths: Paths) -> Models:
    """Compare parent and assembled child on validation sequences; the parent's logits come from the cache."""
    run, parent = params.run, Parent(paths.parent)
    device = compute(run.device, run.dtype, run.threads)
    tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", sequences[0], sequences[-1] + 1)).long()
    reader = BoundaryReader(paths.activations, "validation", parent.config.num_blocks)
    last = reader.read(sequences).to(device.device, device.dtype)
    child = _last_hidden(paths, target, tokens, device)
    _, norm, lm_head = parent.outside(device.device, device.dtype)
    with torch.inference_mode():
        head = Head(norm, lm_head, parent.config.rms_norm_eps)
        losses = compare_with_parent(head, tokens.to(device.device), last, [last, child])
    return {name: per_sequence(one) for name, one in zip(("parent", "assembled"), losses, strict=True)}


def _last_hidden(paths: Paths, target: str, tokens: Tensor, device: Compute) -> Tensor:
    """The child's hidden states before the final norm, block by block from its checkpoint."""
    checkpoint = Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
    config, blocks = read_blocks(checkpoint)
    embedding = checkpoint.tensor(EMBEDDING).to(device.device, device.dtype)
    lazily = ((*blocks[i], checkpoint.block(i, device.device, device.dtype)) for i in range(config.num_blocks))
    *_, last = boundaries(config, embedding, lazily, tokens, len(tokens))
    return last


@task(cache_policy=NO_CACHE)
def measure_speed(target: str, params: Params, paths: Paths) -> dict[str, Any] | None:
    """Time parent and child end to end, interleaved, at the target's first speed constraint of engine torch.

    Returns:
        Medians in ms and tokens/s of both, on this machine; None when the target limits no speed of this engine.
    """
    limits = [c for c in params.target(target).constraints.values() if c.metric in SPEED_METRICS and c.engine == ENGINE]
    if not limits:
        return None
    limit = limits[0]
    assert limit.scenario is not None
    assert limit.hardware is not None
    work, repeats = Workload.of(limit.scenario, limit.batch), params.evaluate_child.speed_repeats
    device = compute(params.run.device, params.run.dtype, params.measure_costs.threads)
    checkpoint = Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
    pair = parent_and_child(Parent(paths.parent), checkpoint, device)
    timed = time_models(dict(zip(("parent", "assembled"), pair, strict=True)), work, repeats, device)
    setting = Setting(limit.hardware, ENGINE, limit.precision, 1, limit.scenario, limit.batch)
    result: dict[str, Any] = {
        "hardware": limit.hardware,
        "machine": machine(device.device),
        "is_timed_machine": is_timed_machine(limit.hardware, machine(device.device)),
        "engine": ENGINE,
        "precision": params.run.dtype,
        "scenario": limit.scenario,
        "batch": limit.batch,
        "repeats": repeats,
        "origin": "measured",
    }
    for name, rounds in timed.items():
        prefill, decode = (statistics.median(rounds[phase]) for phase in ("prefill", "decode"))
        speed = ModelSpeed(setting, prefill, decode)
        result[name] = {
            "prefill_ms": prefill,
            "decode_ms": decode,
            "throughput": speed.throughput,
            "decode_throughput": speed.decode_throughput,
            "latency_ms": speed.latency_ms,
        }
    return result


@task(cache_policy=NO_CACHE)
def write_evaluation(
    target: str, batches: list[Models], speed: dict[str, Any] | None, params: Params, paths: Paths
) -> None:
    """Join the batches and write evaluation.parquet and evaluation.json."""
    models = {name: [one for batch in batches for one in batch[name]] for name in batches[0]}
    rows = [
        {"model": name, "sequence": index, **asdict(one)}
        for name, sequences in models.items()
        for index, one in enumerate(sequences)
    ]
    with write_whole(paths.evaluation(target).with_suffix(".parquet")) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
    chosen = read_json(paths.architecture(target), f"dvc repro search_architecture@{target}")
    parent, child = Parent(paths.parent), Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
    sizes = {"parent": _sizes(parent.checkpoint, parent.config, parent.config.num_blocks * parent.config.num_kv_heads)}
    config, blocks = read_blocks(child)
    sizes["assembled"] = _sizes(child, config, sum(attention.num_kv_heads for attention, _ in blocks))
    constraints = [
        {**one, "measured": _measured(params.target(target).constraints[one["name"]], sizes, speed)}
        for one in chosen["constraints"]
    ]
    write_json(
        paths.evaluation(target),
        {
            "target": target,
            "label": chosen["label"],
            "tokens": params.evaluate_child.tokens,
            "sequences": len(models["parent"]),
            **{name: asdict(summarise(sequences)) for name, sequences in models.items()},
            "predicted": {"score": chosen["predicted"]["score"], "score_stderr": chosen["predicted"]["score_stderr"]},
            "constraints": constraints,
            "speed": speed,
        },
    )


def _sizes(checkpoint: Checkpoint, config: ModelConfig, num_kv_heads: int) -> ModelSizes:
    """Sizes counted on a checkpoint's tensors; `num_kv_heads` over all blocks."""
    params = block_params = weight_bytes = 0
    for name in checkpoint.files:
        tensor = checkpoint.tensor(name)
        params += tensor.numel()
        weight_bytes += tensor.numel() * tensor.element_size()
        block_params += tensor.numel() * name.startswith("model.layers.")
    element = checkpoint.tensor(EMBEDDING).element_size()
    return ModelSizes(params, block_params, weight_bytes, 2 * num_kv_heads * config.head_dim * element)


def _measured(limit: Constraint, sizes: dict[str, ModelSizes], speed: dict[str, Any] | None) -> float | None:
    """The constraint's value on the assembled child, None where it cannot be had on this machine."""
    if limit.metric in SPEED_METRICS:
        at = (limit.hardware, limit.engine, limit.scenario, limit.batch)
        if speed is None or at != (speed["hardware"], speed["engine"], speed["scenario"], speed["batch"]):
            return None
        values = {name: float(speed[name][limit.metric]) for name in ("parent", "assembled")}
    else:
        values = {name: _size(limit, size) for name, size in sizes.items()}
    relative = limit.at_most_ratio is not None or limit.at_least_ratio is not None
    return values["assembled"] / values["parent"] if relative else values["assembled"]


def _size(limit: Constraint, sizes: ModelSizes) -> float:
    match limit.metric:
        case "params":
            return sizes.params
        case "block_params":
            return sizes.block_params
        case "weight_bytes":
            return sizes.weight_bytes
        case "kv_bytes":
            return sizes.kv_bytes_per_token
        case _:
            assert limit.context is not None
            return sizes.memory_gib(limit.batch, limit.context)
