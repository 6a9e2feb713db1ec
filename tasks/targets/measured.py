"""Measured values of a child, in the units of limits: sizes counted on tensors, speeds of benchmark_throughput.

In: checkpoints, rows of throughput.parquet, limits of architecture.json. Out: values and ratios for evaluation.json.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from storage.architecture import ReachedLimit
from storage.checkpoints import Checkpoint
from storage.evaluation import MeasuredSpeed, SpeedRatio
from storage.metrics import METRICS, BlockCount, SizeParts
from storage.model_config import EMBEDDING, ModelConfig
from storage.records import ThroughputRow
from storage.scenario import Scenario
from storage.variants import Attention
from tasks.puzzle.costs.cost_table import ModelSizes
from tasks.puzzle.costs.pairs import parent_child_pairs, ratio


@dataclass(frozen=True)
class Counted:
    """Sizes of a checkpoint, counted on tensors.

    Attributes:
        sizes: parameters and bytes.
        attention: the attention variant of every block.
        looked_up_bytes: bytes of an embedding that is not the head as well, of which a step reads rows; 0 if it is.
    """

    sizes: ModelSizes
    attention: tuple[Attention, ...]
    looked_up_bytes: int


def count(checkpoint: Checkpoint, config: ModelConfig, attention: Sequence[Attention]) -> Counted:
    """Count the sizes of a checkpoint with these attention variants, one a block."""
    params = block_params = weight_bytes = 0
    for name in checkpoint.files:
        tensor = checkpoint.tensor(name)
        params += tensor.numel()
        weight_bytes += tensor.numel() * tensor.element_size()
        block_params += tensor.numel() * name.startswith("model.layers.")
    element = checkpoint.tensor(EMBEDDING).element_size()
    kv_bytes = 2 * sum(variant.num_kv_heads for variant in attention) * config.head_dim * element
    return Counted(
        ModelSizes(params, block_params, weight_bytes, kv_bytes),
        tuple(attention),
        0 if config.tie_embeddings else element * config.vocab_size * config.hidden_size,
    )


def speed_ratios(rows: Sequence[ThroughputRow], counted: Mapping[str, Counted]) -> Iterator[SpeedRatio]:
    """Yield the speed of the child over the parent's at every setting that benchmark_throughput measured.

    Beside it what the cost table predicts, and for decode what the bytes that a step reads would allow (weights with
    the head, KV cache at the mean context). `drift` is the parent's speed as measured here over what the timings in git
    predict, 1 on the machine that they were taken on.

    Args:
        rows: throughput.parquet.
        counted: sizes of `parent` and `assembled`.
    """
    for parent, child in parent_child_pairs(row for row in rows if row.measured_ms is not None):
        read_bytes = None
        if parent.phase == "decode":
            read_bytes = _read_bytes(parent, counted["parent"]) / _read_bytes(parent, counted["assembled"])
        yield SpeedRatio(
            engine=parent.engine,
            precision=parent.precision,
            scenario=parent.scenario,
            batch=parent.batch,
            phase=parent.phase,
            measured=ratio(child.measured_tokens_per_s, parent.measured_tokens_per_s),
            measured_spread=max(parent.measured_spread or 0.0, child.measured_spread or 0.0),
            predicted=ratio(child.predicted_tokens_per_s, parent.predicted_tokens_per_s),
            drift=ratio(parent.measured_tokens_per_s, parent.predicted_tokens_per_s),
            read_bytes=read_bytes,
        )


def _read_bytes(row: ThroughputRow, counted: Counted) -> float:
    """Count the bytes that a decode step reads at the mean context, in the checkpoint's precision."""
    cached = row.batch * Scenario.parse(row.scenario).mean_context * counted.sizes.kv_bytes_per_token
    return counted.sizes.weight_bytes - counted.looked_up_bytes + cached


def measured_speed(limit: ReachedLimit, rows: Sequence[ThroughputRow]) -> MeasuredSpeed | None:
    """Return the speeds of parent and child that benchmark_throughput measured where a limit on a speed holds.

    Returns:
        None where none were measured: another engine, several devices, or a mix of scenarios.
    """
    position = (limit.engine, limit.scenario, limit.batch, limit.tensor_parallel)
    measured = {
        (row.model, row.phase): row
        for row in rows
        if row.measured_ms is not None and (row.engine, row.scenario, row.batch, row.tensor_parallel) == position
    }
    if not measured or limit.mix:
        return None
    row = measured["parent", "decode"]
    setting = limit.setting
    return MeasuredSpeed(
        hardware=setting.hardware,
        machine=row.machine,
        is_timed_machine=row.hardware == setting.hardware,
        engine=row.engine,
        precision=row.precision,
        scenario=row.scenario,
        batch=row.batch,
        origin="measured",
        parent=_speeds(measured["parent", "prefill"], measured["parent", "decode"]),
        assembled=_speeds(measured["child", "prefill"], measured["child", "decode"]),
    )


def _speeds(prefill: ThroughputRow, decode: ThroughputRow) -> dict[str, float]:
    """Return the milliseconds of the phases, and every speed metric in its unit."""
    assert prefill.measured_ms is not None
    assert decode.measured_ms is not None
    output_tokens = Scenario.parse(decode.scenario).output_tokens
    speeds = {"prefill_ms": prefill.measured_ms, "decode_ms": decode.measured_ms}
    for metric in METRICS.values():
        if metric.speed:
            speeds[metric.name] = metric.speed.value(
                prefill.measured_ms, decode.measured_ms, output_tokens, decode.batch
            )
    return speeds


def measured_value(limit: ReachedLimit, counted: Mapping[str, Counted], rows: Sequence[ThroughputRow]) -> float | None:
    """Return the assembled child's value in a limit's unit, None where this machine cannot measure it.

    A limit that counts a workspace has none: the workspace is modelled.

    Args:
        limit: a limit of architecture.json.
        counted: sizes of `parent` and `assembled`.
        rows: throughput.parquet.
    """
    if limit.workspace_gib:
        return None
    if limit.is_speed:
        speed = measured_speed(limit, rows)
        if speed is None:
            return None
        child, parent = speed.assembled[limit.metric], speed.parent[limit.metric]
    else:
        child, parent = _size(limit, counted["assembled"]), _size(limit, counted["parent"])
    return child / parent if limit.relative else child


def _size(limit: ReachedLimit, counted: Counted) -> float:
    """Return a size of a checkpoint, in the metric's unit."""
    parts = METRICS[limit.metric].parts
    if isinstance(parts, BlockCount):
        return parts.count(variant.kind for variant in counted.attention)
    assert isinstance(parts, SizeParts), limit
    cached_tokens = (limit.batch or 0) * (limit.context or 0)
    return counted.sizes.value(parts, cached_tokens, limit.tensor_parallel or 1)
