"""The demand of every stage of dvc.yaml on a machine, modelled from sizes alone.

In: the stages, a parent's geometry, params, rates of a machine. Out: seconds, peak memory and disk of each stage.

The arithmetic answers one question before a run of hours or weeks: do time, memory and disk suffice for this parent,
these params and this machine? `puzzle plan` prints the answer, with the time that a stage took beside its estimate once
it has run. An estimator counts the operations and bytes of its stage's own code; starting a process, or a solver, is a
multiple of the machine's `start_seconds`. Tests keep it from drifting: each stage of dvc.yaml has an estimator, bytes
on disk are compared with those that a small run writes, operations with counts by hand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from storage.fields import resolved
from storage.formats import FORMATS, FormatName
from storage.metrics import METRICS, SizeParts
from storage.model_config import ModelConfig
from storage.params import Params
from storage.pipeline import PipelineStage
from storage.scenario import Scenario
from storage.targets import Target
from storage.variants import Attention, Ffn
from tasks.engines.machine import blocks_per_group, bytes_of_replacements
from tasks.estimates.rank_memory import cpu_bytes, rank_bytes
from tasks.estimates.stage_case import StageCase
from tasks.puzzle.costs.sizes import attention_elements, ffn_elements
from tasks.puzzle.removals import CANDIDATES, MOST_REMOVED

_MASTER_BYTES = 12  # float32 weight and AdamW's two moments
_CHECKPOINTED = 4 * _MASTER_BYTES // 3  # and the best weights so far
_BACKWARD = 2.4  # of the forward's operations: gradients of weights, and of inputs where something before them trains
_OFFLOADED_BATCH = 12  # masters to the GPU for both passes, gradients back, for every batch
_OFFLOADED_STEP = 6  # AdamW in the machine's memory, which is about five times as fast as the link to a GPU
ON_WORKERS = {"cache_activations", "distill_blocks", "score_blocks", "evaluate_child", "export_parent", "export_child"}
"""Stages whose pieces are computed by the workers of `execution.runner`."""
_PROCESS_BYTES = 0.6e9  # memory of a process with its libraries, beside what its stage holds


@dataclass(frozen=True)
class Rates:
    """A machine: FLOP/s of all workers together in blocks, in the head and in float32 products, bytes/s, seconds.

    `disk_bytes_per_s` counts what is written and hashed, `read_bytes_per_s` weights from mapped files to the device.
    """

    block_flops: float
    head_flops: float
    float32_flops: float
    memory_bytes_per_s: float
    disk_bytes_per_s: float
    read_bytes_per_s: float
    hash_bytes_per_s: float
    start_seconds: float


@dataclass(frozen=True)
class Demand:
    """The demand of a stage on any machine: operations, bytes through memory (streamed) and disk (moved), bytes held.

    `read_bytes` are weights and states that are read while it computes, `hashed_bytes` those that it compares with
    their checksums, once a process. `memory_bytes` come on top of the process itself; `host_bytes` are those of a
    machine with a GPU, where a stage holds much of them. `starts` is a multiple of the machine's `start_seconds`.
    """

    block_flops: float = 0.0
    head_flops: float = 0.0
    float32_flops: float = 0.0
    streamed_bytes: float = 0.0
    moved_bytes: float = 0.0
    read_bytes: float = 0.0
    hashed_bytes: float = 0.0
    memory_bytes: float = 0.4e9
    host_bytes: float = 0.0
    disk_bytes: float = 0.0
    starts: float = 1.0
    devices: int = 1

    def seconds(self, rates: Rates) -> float:
        """Time on a machine with these rates."""
        seconds = self.block_flops / rates.block_flops + self.head_flops / rates.head_flops
        seconds += self.float32_flops / rates.float32_flops
        seconds += self.streamed_bytes / rates.memory_bytes_per_s
        seconds += self.read_bytes / rates.read_bytes_per_s + self.hashed_bytes / rates.hash_bytes_per_s
        return seconds + (self.moved_bytes / rates.disk_bytes_per_s + self.starts * rates.start_seconds)


@dataclass(frozen=True)
class StageEstimate:
    """One stage, modelled: seconds, bytes of memory at the peak, on disk that it leaves, read and hashed; its GPUs."""

    stage: str
    seconds: float
    memory_bytes: float
    disk_bytes: float
    read_bytes: float
    hashed_bytes: float
    devices: int = 1


def estimate_stages(
    pipeline: Sequence[PipelineStage], config: ModelConfig, params: Params, rates: Rates
) -> tuple[StageEstimate, ...]:
    """Estimate all stages in the order of dvc.yaml; a stage of each target has one estimate for every target."""
    return tuple(
        StageEstimate(
            stage=name,
            seconds=demand.seconds(rates),
            memory_bytes=demand.memory_bytes + _PROCESS_BYTES,
            disk_bytes=demand.disk_bytes,
            read_bytes=demand.read_bytes,
            hashed_bytes=demand.hashed_bytes,
            devices=demand.devices,
        )
        for name, demand in _demands(pipeline, config, params)
    )


def estimate_memory(
    pipeline: Sequence[PipelineStage], config: ModelConfig, params: Params
) -> dict[str, tuple[float, float]]:
    """Estimate the peak memory of all stages by their names, bytes: of the device, of the machine with a GPU."""
    return {
        name: (demand.memory_bytes + _PROCESS_BYTES, demand.host_bytes + _PROCESS_BYTES)
        for name, demand in _demands(pipeline, config, params)
    }


def _demands(pipeline: Sequence[PipelineStage], config: ModelConfig, params: Params) -> Iterator[tuple[str, Demand]]:
    """Yield name and demand of each stage; a stage that runs per target has `@target` in its name."""
    for stage in pipeline:
        cases = {stage.name: StageCase(config, params)}
        if stage.per_target:
            shares = {key: kept_share(target) for key, target in params.targets.items()}
            cases = {f"{stage.name}@{key}": StageCase(config, params, share) for key, share in shares.items()}
        for name, case in cases.items():
            demand = ESTIMATORS[stage.name](case)
            if stage.name in ON_WORKERS and params.execution.runner == "processes":  # each has embedding and head
                others = (case.workers - 1) * (_PROCESS_BYTES + case.compute_bytes * case.outside_params)
                demand = replace(demand, memory_bytes=demand.memory_bytes + others)
            yield name, demand


def kept_share(target: Target) -> float:
    """Return the share of the parent's block parameters that a child keeps, as far as the target's limits say."""
    shares = [1.0]
    for limit in target.constraints.values():
        parts = METRICS[limit.metric].parts
        if isinstance(parts, SizeParts) and parts.params and parts.blocks_only and limit.at_most_ratio:
            shares.append(limit.at_most_ratio)
    return min(shares)


def _prepare_parent(case: StageCase) -> Demand:
    return Demand(
        moved_bytes=4 * case.parent_bytes,
        memory_bytes=2.0 * case.outside_params,
        disk_bytes=case.parent_bytes,
        starts=2.5,
    )


def _write_text(case: StageCase) -> Demand:
    """The parent's weights are read at each step of a batch; memory holds them, and the cache of every row."""
    settings, blocks = case.params.write_text, case.config.num_blocks
    batches = sum(map(settings.batches, case.params.prepare_corpus.written_kinds))
    if not batches:
        return Demand()
    tokens, in_compute = batches * settings.rows * settings.row_tokens, case.compute_bytes / 2 * case.parent_bytes
    row = settings.row_tokens * blocks * 2 * case.config.num_kv_heads * case.config.head_dim * case.compute_bytes
    return Demand(
        block_flops=tokens * blocks * case.block_flops,
        head_flops=tokens * case.head_flops,
        streamed_bytes=batches * settings.row_tokens * (in_compute + settings.rows * row / 2),
        memory_bytes=in_compute + case.workers * settings.rows * (row + 12.0 * case.config.vocab_size),
        disk_bytes=5.0 * tokens,
    )


def _prepare_corpus(case: StageCase) -> Demand:
    corpus = case.params.prepare_corpus
    tokens = case.corpus_tokens + sum(domain.tokens for domain in corpus.domains.values())
    return Demand(memory_bytes=1.5e9, disk_bytes=4.0 * (tokens + tokens / corpus.seq_len), starts=2)


def _cache_activations(case: StageCase) -> Demand:
    held = case.rolling_bytes if case.is_rolling else case.materialised_bytes
    return Demand(
        block_flops=case.config.num_blocks * case.cached_tokens * case.block_flops,
        moved_bytes=3 * held,
        read_bytes=case.cache_passes * case.parent_in_compute,
        hashed_bytes=case.parent_bytes,
        memory_bytes=case.workers * (2.0 * case.outside_params + 2 * case.compute_bytes * case.block_params),
        disk_bytes=held,
    )


def _distill_blocks(case: StageCase) -> Demand:
    """Estimate importance, closed-form start, steps and held-out losses of all variants of every block."""
    config, bld = case.config, case.params.distill_blocks
    attentions, ffns = case.trained_attentions, case.trained_ffns
    tokens, width = case.variant_tokens, config.intermediate_size
    attend, up = case.parent_attention_flops, 2.0 * case.parent_ffn_flops / 3  # gate and up projections
    all_ffns = sum(map(case.ffn_flops, ffns))
    all_attentions = sum(case.attention_flops(attention) + case.parent_ffn_flops for attention in attentions)
    flops = min(bld.importance_tokens, bld.used_tokens) * (attend + up)
    if bld.fit_tokens:
        flops += bld.fit_tokens * (attend + sum(map(case.attention_flops, attentions)) + up)
    flops += tokens * (attend + (1 + _BACKWARD) * (all_ffns + 0.8 * all_attentions))
    checked_tokens = bld.check_steps * bld.sequences_per_step * case.params.prepare_corpus.seq_len
    checks = tokens / checked_tokens if checked_tokens else 0.0  # held-out losses while a variant trains
    flops += (3 + checks) * bld.held_out_tokens * (attend + all_ffns + all_attentions)
    params = sum(ffn_elements(config, ffn).matrix for ffn in ffns)
    params += sum(attention_elements(config, attention).matrix for attention in attentions)
    steps = tokens / (case.params.prepare_corpus.seq_len * bld.sequences_per_step)
    spans = sum(config.num_blocks - span + 1 for span in bld.spans)
    num_ranges = config.num_blocks + spans
    whole = tokens * ((1 + _BACKWARD) * case.block_flops + attend)
    library = (num_ranges * params + spans * case.block_params) * case.compute_bytes
    return Demand(
        block_flops=case.in_order(num_ranges * flops + spans * whole, case.bld_read_tokens),
        float32_flops=num_ranges * _fit_flops(case, attentions, ffns) * case.slowdown,
        streamed_bytes=num_ranges * steps * params * 3 * _MASTER_BYTES,
        moved_bytes=3 * library,
        read_bytes=case.parent_in_compute + 2 * config.num_blocks * case.bld_boundary_bytes,
        hashed_bytes=case.parent_bytes + (config.num_blocks + 1) * case.bld_boundary_bytes,
        memory_bytes=case.workers * (params * (_MASTER_BYTES + 3 * case.compute_bytes) + 3 * 8.0 * width**2),
        disk_bytes=library,
    )


def _fit_flops(case: StageCase, attentions: Sequence[Attention], ffns: Sequence[Ffn]) -> float:
    """Count float32 operations of the closed-form start in one block: moments of the features, then the solutions."""
    config, tokens = case.config, case.params.distill_blocks.fit_tokens
    if not tokens:
        return 0.0
    heads, hidden, width = config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size
    moments = len(attentions) * 2.0 * heads * (heads + hidden) + 2.0 * width**2
    solved = 0.0
    for ffn in ffns:
        channels = ffn.intermediate_size
        solved += channels**3 / 3 + 2.0 * channels * hidden * (channels + width)
    return tokens * moments + 2.0 * solved  # float64 runs at half the rate


def _score_blocks(case: StageCase) -> Demand:
    """Each candidate runs from its block to the end, and through the head; then blocks are removed one by one."""
    num_blocks, score = case.config.num_blocks, case.params.score_blocks
    trained, no_ops = len(case.trained_attentions) + len(case.trained_ffns), 2
    scored = (trained + no_ops) * score.tokens + trained * score.initial_tokens
    suffix: float = scored * sum(range(1, num_blocks + 1))
    at_once = blocks_per_group(case.params, case.config)
    groups = -(-num_blocks // at_once)
    batches = score.tokens / (resolved(score.sequences_per_batch) * score.length(case.params.prepare_corpus.seq_len))
    heads = num_blocks * scored + 2 * groups * score.tokens
    num_read = num_blocks * trained
    for span in case.params.distill_blocks.spans:
        num_ranges, scored_at_span = num_blocks - span + 1, (1 + trained + no_ops) * score.tokens
        suffix += scored_at_span * sum(range(1, num_ranges + 1))
        heads += num_ranges * scored_at_span
        num_read += num_ranges * (1 + trained)
    for removed in range(int(MOST_REMOVED * num_blocks) if score.depth_tokens else 0):
        num_tried = min(CANDIDATES, num_blocks - removed)
        suffix += score.depth_tokens * (1 + num_tried) * (num_blocks - removed) / 2
        heads += score.depth_tokens * (2 + num_tried)
    return Demand(
        block_flops=case.in_order(suffix * case.block_flops, score.tokens),
        head_flops=heads * case.head_flops * case.slowdown,
        memory_bytes=case.compute_bytes * (case.outside_params + case.workers * 4 * case.block_params)
        + case.workers * at_once * bytes_of_replacements(case.params, case.config),
        read_bytes=groups * batches * case.parent_in_compute / 2,
        hashed_bytes=case.parent_bytes + num_read * case.block_params * case.compute_bytes,
    )


def _starts(count: float) -> Callable[[StageCase], Demand]:
    """Return the estimator of a stage that takes little beside its start."""
    return lambda _: Demand(starts=count)


def _assemble_child(case: StageCase) -> Demand:
    return Demand(moved_bytes=3 * case.child_bytes, disk_bytes=case.child_bytes)


_RIDGES_TRIED = 5
"""Strengths of the correction that a subblock tries before one is worse than the one before it."""


def _refine_child(case: StageCase) -> Demand:
    """Each token runs twice through the child's blocks and through the parent's attentions, for features and states.

    Held-out tokens run three times more: without the correction, and for the errors along depth.
    """
    config, settings = case.config, case.params.refine_child
    if not settings.tokens:
        return _assemble_child(case)
    tokens, held_out = settings.tokens + settings.held_out_tokens, settings.held_out_tokens
    hidden, width = config.hidden_size, case.kept_share * config.intermediate_size
    features = config.num_heads * config.head_dim, width
    summed = sum(2.0 * inputs * (inputs + hidden) for inputs in features)
    solved = sum(inputs**3 / 3 + 4.0 * inputs**2 * hidden for inputs in features)
    block_flops = tokens * (2 * case.child_flops + 2 * config.num_blocks * case.parent_attention_flops)
    states = (tokens + held_out) * hidden * case.compute_bytes
    return Demand(
        block_flops=block_flops + 3 * held_out * case.child_flops + case.in_order(0.0, tokens),
        float32_flops=config.num_blocks * (tokens * summed + 2 * _RIDGES_TRIED * solved),  # float64 at half the rate
        moved_bytes=4 * config.num_blocks * states + 4 * case.child_bytes,
        read_bytes=config.num_blocks * states,
        hashed_bytes=case.parent_bytes + config.num_blocks * states,
        memory_bytes=3.0 * case.compute_bytes * case.block_params
        + (4.0 * (2 + case.workers) + 3 * 8.0) * config.intermediate_size**2,
        disk_bytes=case.child_bytes,
    )


def _distill_child(case: StageCase) -> Demand:
    """On ranks with a GPU each, time and memory are those of one of them."""
    gkd, config = case.params.distill_child, case.config
    if not gkd.tokens:
        return _assemble_child(case)
    params = case.kept_share * config.num_blocks * case.block_params
    steps = gkd.tokens / (case.params.prepare_corpus.seq_len * gkd.sequences_per_step)
    checkpoints = steps / gkd.checkpoint_steps
    held_out = (1 + checkpoints) * gkd.held_out_tokens
    # hidden states of a sequence that the backward pass needs, in elements
    saved = (
        case.params.prepare_corpus.seq_len
        * config.num_blocks
        * (12 * config.hidden_size + 4 * config.intermediate_size)
    )
    taught = gkd.tokens if case.has_live_teacher else 0
    batches = -(-gkd.sequences_per_step // max(1, gkd.ranks * gkd.sequences_per_batch))  # of a rank, in a step
    devices = gkd.ranks if gkd.ranks and case.params.run.device.startswith("cuda") else 1
    passes = 4 if gkd.ranks else 3  # ranks compute every block a second time
    memory = (
        params * (_CHECKPOINTED + 4 + case.workers * 4 + 2 * case.compute_bytes)
        + case.compute_bytes * (case.outside_params + case.workers * saved)
        + (case.compute_bytes * config.num_blocks * case.block_params if case.has_live_teacher else 0)
    )
    if gkd.ranks:
        memory = gkd.ranks / devices * (rank_bytes(case) + _PROCESS_BYTES)
    block_flops = (passes * gkd.tokens + held_out) * case.child_flops + taught * config.num_blocks * case.block_flops
    return Demand(
        block_flops=block_flops / devices,
        head_flops=(3 * gkd.tokens + 2 * held_out) * case.head_flops / devices,
        streamed_bytes=steps * params * 4 * _MASTER_BYTES / devices,
        moved_bytes=checkpoints * params * _CHECKPOINTED + 4 * case.child_bytes,
        read_bytes=(steps * case.parent_in_compute if gkd.teacher == "streamed" else 0.0)
        + (steps * params / devices * (_OFFLOADED_BATCH * batches + _OFFLOADED_STEP) if gkd.offload else 0.0),
        hashed_bytes=case.parent_bytes if case.has_live_teacher else gkd.tokens * case.token_bytes,
        memory_bytes=memory,
        host_bytes=gkd.ranks * (cpu_bytes(case) + _PROCESS_BYTES) if gkd.ranks else 0.0,
        disk_bytes=case.child_bytes,
        starts=2.0 if gkd.ranks else 1.0,
        devices=devices,
    )


def _export_parent(case: StageCase) -> Demand:
    return _export(case, case.params.export_parent.formats, case.parent_bytes)


def _export_child(case: StageCase) -> Demand:
    return _export(case, case.params.export_child.formats, case.child_bytes)


def _export(case: StageCase, formats: Sequence[FormatName], checkpoint_bytes: float) -> Demand:
    """Tensors are read for each format, written, hashed; memory has one in 16 bit and encoded, or a whole shard."""
    size = sum(FORMATS[name].size_ratio for name in formats) * checkpoint_bytes
    embedding = 6.0 * case.config.hidden_size * case.config.vocab_size
    held = max(embedding, min(case.params.export_child.max_shard_gib * 2**30, size))
    return Demand(moved_bytes=3 * size, memory_bytes=case.workers * held, disk_bytes=size)


def _benchmark_throughput(case: StageCase) -> Demand:
    benchmark = case.params.benchmark_throughput
    if not benchmark.engines and not case.has_speed_limit:
        return Demand()
    prefill_tokens = decode_steps = 0.0
    for scenario in benchmark.scenarios:
        lengths = Scenario.parse(scenario)
        for batch in benchmark.batches:
            prefill_tokens += batch * (lengths.input_tokens * (benchmark.repeats + 1) + lengths.mean_context)
            decode_steps += 16 * benchmark.repeats + 1
    held = case.compute_bytes / 2 * (case.parent_bytes + case.child_bytes)
    return Demand(
        block_flops=round(prefill_tokens) * ((1 + case.kept_share) * case.config.num_blocks * case.block_flops),
        streamed_bytes=round(decode_steps) * held,
        moved_bytes=2 * held,
        memory_bytes=held,
        starts=2.5,
    )


def _evaluate_child(case: StageCase) -> Demand:
    """Estimate three states of the child on every domain, and on all but the training's own the parent too."""
    evaluate = case.params.evaluate_child
    num_ggufs = sum(FORMATS[name].is_gguf for name in case.params.export_child.formats)
    exported_head = 4.0 * case.config.hidden_size * case.config.vocab_size
    other_tokens = [min(evaluate.tokens, domain.tokens) for domain in case.params.prepare_corpus.domains.values()]
    tokens = evaluate.tokens + sum(other_tokens)
    num_baselines = 4 + case.params.search_baselines.random_seeds
    domain_tokens = sum(min(evaluate.domain_baseline_tokens, size) for size in other_tokens)
    baseline_tokens = num_baselines * (evaluate.baseline_tokens + domain_tokens)
    batches = tokens / (resolved(evaluate.sequences_per_batch) * case.params.prepare_corpus.seq_len)
    return Demand(
        block_flops=(3 * tokens + baseline_tokens) * case.child_flops
        + sum(other_tokens) * case.config.num_blocks * case.block_flops,
        head_flops=(5 * tokens + baseline_tokens) * case.head_flops,
        float32_flops=evaluate.export_tokens
        * ((1 + num_ggufs) * case.child_flops + 3 * (1 + num_ggufs) * case.head_flops),
        memory_bytes=max(
            case.compute_bytes * (case.outside_params + case.workers * 3 * case.block_params),
            case.workers * 2 * exported_head if evaluate.export_tokens else 0.0,
        ),
        read_bytes=batches * (3 * case.child_bytes + case.parent_bytes),
        hashed_bytes=3 * case.child_bytes + case.parent_bytes,
    )


def _measure_accuracy(case: StageCase) -> Demand:
    """Estimate the memory alone: one model as a whole; how long a benchmark takes is not modelled."""
    return Demand(memory_bytes=case.compute_bytes / 2 * case.parent_bytes) if case.num_benchmarks else Demand()


ESTIMATORS: Mapping[str, Callable[[StageCase], Demand]] = {
    "prepare_parent": _prepare_parent,
    "measure_costs": _starts(1.0),
    "export_parent": _export_parent,
    "write_text": _write_text,
    "prepare_corpus": _prepare_corpus,
    "cache_activations": _cache_activations,
    "distill_blocks": _distill_blocks,
    "score_blocks": _score_blocks,
    "search_architecture": _starts(0.6),
    "search_baselines": _starts(0.6),
    "assemble_child": _assemble_child,
    "refine_child": _refine_child,
    "distill_child": _distill_child,
    "export_child": _export_child,
    "benchmark_throughput": _benchmark_throughput,
    "evaluate_child": _evaluate_child,
    "measure_accuracy": _measure_accuracy,
    "report": _starts(2.5),
}
"""Every stage of dvc.yaml -> its estimator."""
