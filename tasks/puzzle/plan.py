"""What every stage will take, from sizes alone: floating-point operations, bytes moved, bytes held. No torch.

In: a parent's geometry, params, rates of a machine. Out: seconds, peak memory and disk of each stage (modelled). The
operations are those that the stages' own code does; what a rate cannot say (starting a process, a solver) is a constant
of the machine, `start_seconds`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from storage.model_config import ModelConfig
from storage.records import Attention, Ffn
from tasks.puzzle.variants import attention_elements, ffn_elements, parent_attention, parent_ffn

_MASTER_BYTES = 12  # float32 weight and AdamW's two moments
_CHECKPOINTED = 4 * _MASTER_BYTES // 3  # and the best weights so far


@dataclass(frozen=True)
class Rates:
    """A machine: FLOP/s of all workers together in blocks, in the head and in float32 products, bytes/s, seconds."""

    block_flops: float
    head_flops: float
    float32_flops: float
    memory_bytes_per_s: float
    disk_bytes_per_s: float
    start_seconds: float


@dataclass(frozen=True)
class Work:
    """Tokens of each stage, and how the work is cut: params.yaml, flattened. Bytes are per element of each dtype.

    `kept_boundaries` is how many the cache keeps in rolling mode; `bld_tokens` are a variant's on average,
    `bld_read_tokens` all that BLD reads, `bld_checks` the held-out losses while a variant trains.
    """

    seq_len: int
    train_tokens: int
    calibration_tokens: int
    validation_tokens: int
    cache_bytes: int
    compute_bytes: int
    rolling: bool
    kept_boundaries: int
    workers: int
    attentions: tuple[Attention, ...]
    ffns: tuple[Ffn, ...]
    spans: tuple[int, ...]
    importance_tokens: int
    fit_tokens: int
    bld_tokens: float
    bld_read_tokens: int
    bld_checks: float
    bld_sequences_per_step: int
    bld_held_out_tokens: int
    score_tokens: int
    initial_score_tokens: int
    blocks_per_group: int
    gkd_tokens: int
    gkd_sequences_per_step: int
    gkd_held_out_tokens: int
    gkd_checkpoint_steps: int
    evaluate_tokens: int
    baseline_tokens: int
    num_baselines: int
    export_tokens: int
    num_ggufs: int
    child_export_ratio: float
    parent_export_ratio: float
    export_shard_bytes: float
    benchmark_prefill_tokens: int
    benchmark_decode_steps: int


@dataclass(frozen=True)
class Estimate:
    """One stage, modelled: seconds, bytes of memory at the peak, bytes on disk that it leaves."""

    stage: str
    seconds: float
    memory_bytes: float
    disk_bytes: float


class Planner:
    """Estimates for one parent, one set of params and one machine."""

    def __init__(self, config: ModelConfig, work: Work, rates: Rates) -> None:
        self._config, self._work, self._rates = config, work, rates
        self._attend = self._attention_flops(parent_attention(config))
        self._ffn = self._ffn_flops(parent_ffn(config))
        self._block = self._attend + self._ffn
        self._head = 2.0 * config.hidden_size * config.vocab_size
        self._block_params = sum(
            elements.matrix + elements.sensitive
            for elements in (
                attention_elements(config, parent_attention(config)),
                ffn_elements(config, parent_ffn(config)),
            )
        )
        self._outside = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
        self._parent_bytes = 2.0 * (config.num_blocks * self._block_params + self._outside)

    def stages(self, targets: dict[str, float]) -> Iterator[Estimate]:
        """All stages in order; `targets` maps each target to the share of block parameters that its child keeps."""
        yield self._prepare_parent()
        yield self._estimate("prepare_corpus", memory=1.5e9, disk=4.0 * self._tokens, starts=2)
        yield self._cache()
        yield self._bld()
        yield self._score()
        yield self._estimate("measure_costs")
        yield self._export("export_parent", self._work.parent_export_ratio * self._parent_bytes)
        for target in targets:
            yield self._estimate(f"search_architecture@{target}", starts=0.6)
        for target in targets:
            yield self._estimate(f"search_baselines@{target}", starts=0.6)
        for target, share in targets.items():
            size = self._child_bytes(share)
            yield self._estimate(f"assemble_child@{target}", moved=3 * size, disk=size)
        for target, share in targets.items():
            yield self._gkd(target, share)
        for target, share in targets.items():
            yield self._export(f"export_child@{target}", self._work.child_export_ratio * self._child_bytes(share))
        for target, share in targets.items():
            yield self._benchmark(target, share)
        for target, share in targets.items():
            yield self._evaluate(target, share)
        for target in targets:
            yield self._estimate(f"measure_accuracy@{target}")
        yield self._estimate("report", starts=2.5)

    @property
    def materialised_bytes(self) -> float:
        """Bytes of the activation cache with all boundaries."""
        return (self._config.num_blocks + 1) * self._boundary_bytes

    @property
    def rolling_bytes(self) -> float:
        """Bytes of the activation cache in rolling mode, with the window that BLD holds."""
        longest = max((1, *self._work.spans))
        window = (longest + 1) * self._bld_read * self._config.hidden_size * self._work.compute_bytes
        return self._work.kept_boundaries * self._boundary_bytes + window

    @property
    def _boundary_bytes(self) -> float:
        return float(self._tokens * self._config.hidden_size * self._work.cache_bytes)

    @property
    def _bld_read(self) -> int:
        """Tokens of a boundary that BLD reads."""
        return self._work.bld_read_tokens + self._work.calibration_tokens

    @property
    def _tokens(self) -> int:
        work = self._work
        return work.train_tokens + work.calibration_tokens + work.validation_tokens

    def _estimate(
        self,
        stage: str,
        *,
        blocks: float = 0.0,
        head: float = 0.0,
        float32: float = 0.0,
        streamed: float = 0.0,
        moved: float = 0.0,
        memory: float = 0.4e9,
        disk: float = 0.0,
        starts: float = 1.0,
    ) -> Estimate:
        """From operations in blocks, head and float32 products, bytes through memory, bytes through the disk."""
        rates = self._rates
        seconds = blocks / rates.block_flops + head / rates.head_flops + float32 / rates.float32_flops
        seconds += streamed / rates.memory_bytes_per_s
        seconds += moved / rates.disk_bytes_per_s + starts * rates.start_seconds
        return Estimate(stage, seconds, memory + 0.6e9, disk)

    def _attention_flops(self, attention: Attention) -> float:
        """Of one token, forward: matrices, then q k^T and the weighted sum of v over half the sequence."""
        elements = attention_elements(self._config, attention)
        attended = 2.0 * self._work.seq_len * self._config.num_heads * self._config.head_dim
        return 2.0 * elements.matrix + (attended if elements.kv_per_token else 0.0)

    def _ffn_flops(self, ffn: Ffn) -> float:
        return 2.0 * ffn_elements(self._config, ffn).matrix

    def _child_bytes(self, share: float) -> float:
        return 2.0 * (share * self._config.num_blocks * self._block_params + self._outside)

    def _prepare_parent(self) -> Estimate:
        return self._estimate(
            "prepare_parent",
            moved=4 * self._parent_bytes,
            memory=2.0 * self._outside,
            disk=self._parent_bytes,
            starts=2.5,
        )

    def _cache(self) -> Estimate:
        held = self.rolling_bytes if self._work.rolling else self.materialised_bytes
        return self._estimate(
            "cache_activations",
            blocks=self._config.num_blocks * self._tokens * self._block,
            moved=3 * held,
            memory=2.0 * self._outside + self._work.compute_bytes * self._block_params,
            disk=held,
        )

    def _trained(self) -> tuple[list[Attention], list[Ffn]]:
        config, work = self._config, self._work
        attentions = [of for of in work.attentions if of.kind != "no_op" and of != parent_attention(config)]
        return attentions, [of for of in work.ffns if of.kind != "no_op" and of != parent_ffn(config)]

    def _bld(self) -> Estimate:
        """Importance, closed-form start, steps and held-out losses of all variants of every block."""
        config, work = self._config, self._work
        attentions, ffns = self._trained()
        heads, width = config.num_heads * config.head_dim, config.intermediate_size
        up = 2.0 * self._ffn / 3  # gate and up projections
        all_ffns = sum(map(self._ffn_flops, ffns))
        all_attentions = sum(self._attention_flops(of) + self._ffn for of in attentions)
        flops, float32 = work.importance_tokens * (self._attend + up), 0.0
        if work.fit_tokens:
            flops += work.fit_tokens * (self._attend + sum(map(self._attention_flops, attentions)) + up)
            moments = len(attentions) * 2.0 * heads * (heads + config.hidden_size) + 2.0 * width**2
            solved = (
                w**3 / 3 + 2.0 * w * config.hidden_size * (w + width) for w in (of.intermediate_size for of in ffns)
            )
            float32 = work.fit_tokens * moments + 2.0 * sum(solved)  # float64 runs at half the rate
        backward = 2.4  # of the forward: gradients of weights, and of inputs where something before them trains
        flops += work.bld_tokens * (self._attend + (1 + backward) * (all_ffns + 0.8 * all_attentions))
        flops += (3 + work.bld_checks) * work.bld_held_out_tokens * (self._attend + all_ffns + all_attentions)
        params = sum(ffn_elements(config, of).matrix for of in ffns)
        params += sum(attention_elements(config, of).matrix for of in attentions)
        steps = work.bld_tokens / (work.seq_len * work.bld_sequences_per_step)
        spans = sum(config.num_blocks - span + 1 for span in work.spans)
        places = config.num_blocks + spans
        whole = work.bld_tokens * ((1 + backward) * self._block + self._attend)
        library = (places * params + spans * self._block_params) * work.compute_bytes
        return self._estimate(
            "distill_blocks",
            blocks=self._in_order(places * flops + spans * whole, self._bld_read),
            float32=places * float32 * self._alone,
            streamed=places * steps * params * 3 * _MASTER_BYTES,
            moved=3 * library,
            memory=work.workers * (params * (_MASTER_BYTES + 3 * work.compute_bytes) + 3 * 8.0 * width**2),
            disk=library,
        )

    def _score(self) -> Estimate:
        """Each candidate runs from its block to the end, and through the head."""
        config, work = self._config, self._work
        attentions, ffns = self._trained()
        trained, no_ops = len(attentions) + len(ffns), 2
        scored = (trained + no_ops) * work.score_tokens + trained * work.initial_score_tokens
        suffix = scored * sum(range(1, config.num_blocks + 1))
        groups = -(-config.num_blocks // work.blocks_per_group)
        heads = config.num_blocks * scored + 2 * groups * work.score_tokens
        read = config.num_blocks * trained
        for span in work.spans:
            places, of_span = config.num_blocks - span + 1, (1 + trained + no_ops) * work.score_tokens
            suffix += of_span * sum(range(1, places + 1))
            heads += places * of_span
            read += places * (1 + trained)
        return self._estimate(
            "score_blocks",
            blocks=self._in_order(suffix * self._block, work.score_tokens),
            head=heads * self._head * self._alone,
            memory=work.compute_bytes * (self._outside + work.workers * 4 * self._block_params),
            moved=2 * read * self._block_params * work.compute_bytes,
        )

    @property
    def _alone(self) -> int:
        """How many times as long work takes in rolling mode, where one worker does all of it."""
        return self._work.workers if self._work.rolling else 1

    def _in_order(self, flops: float, tokens: float) -> float:
        """In rolling mode the one worker takes the tokens through the parent as well."""
        walk = tokens * self._config.num_blocks * self._block if self._work.rolling else 0.0
        return self._alone * (flops + walk)

    def _gkd(self, target: str, share: float) -> Estimate:
        config, work = self._config, self._work
        params = share * config.num_blocks * self._block_params
        blocks = share * config.num_blocks * self._block
        steps = work.gkd_tokens / (work.seq_len * work.gkd_sequences_per_step)
        checkpoints = steps / work.gkd_checkpoint_steps
        held = (1 + checkpoints) * work.gkd_held_out_tokens
        saved = work.seq_len * config.num_blocks * (12 * config.hidden_size + 4 * config.intermediate_size)
        return self._estimate(
            f"distill_child@{target}",
            blocks=(3 * work.gkd_tokens + held) * blocks,
            head=(3 * work.gkd_tokens + 2 * held) * self._head,
            streamed=steps * params * 4 * _MASTER_BYTES,
            moved=checkpoints * params * _CHECKPOINTED + 4 * self._child_bytes(share),
            memory=params * (_CHECKPOINTED + 4 + work.workers * 4 + 2 * work.compute_bytes)
            + work.compute_bytes * (self._outside + work.workers * saved),
            disk=self._child_bytes(share),
        )

    def _evaluate(self, target: str, share: float) -> Estimate:
        config, work = self._config, self._work
        blocks = share * config.num_blocks * self._block
        baselines = work.num_baselines * work.baseline_tokens
        return self._estimate(
            f"evaluate_child@{target}",
            blocks=(2 * work.evaluate_tokens + baselines) * blocks,
            head=(4 * work.evaluate_tokens + baselines) * self._head,
            float32=work.num_ggufs * work.export_tokens * (2 * blocks + 4 * self._head),
            memory=work.compute_bytes * (self._outside + work.workers * 3 * self._block_params),
            moved=4 * self._child_bytes(share),
        )

    def _export(self, stage: str, size: float) -> Estimate:
        """Tensors are read for each form, written, hashed; memory has one in 16 bit and encoded, or a whole shard."""
        embedding = 6.0 * self._config.hidden_size * self._config.vocab_size
        held = max(embedding, min(self._work.export_shard_bytes, size))
        return self._estimate(stage, moved=3 * size, memory=self._work.workers * held, disk=size)

    def _benchmark(self, target: str, share: float) -> Estimate:
        config, work = self._config, self._work
        blocks = (1 + share) * config.num_blocks * self._block
        held = work.compute_bytes / 2 * (self._parent_bytes + self._child_bytes(share))
        return self._estimate(
            f"benchmark_throughput@{target}",
            blocks=work.benchmark_prefill_tokens * blocks,
            streamed=work.benchmark_decode_steps * held,
            moved=2 * held,
            memory=held,
            starts=2.5,
        )
