"""Before any run: what each stage will take on this machine, from the parent's config.json and one minute of timing.

In: params, a config.json (no weights), this machine. Out: estimates, all modelled; beside them what the stages of this
clone took, where they ran.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from storage.files import InputError, read_json, sha256
from storage.gguf import PACKAGE, GgufModel, embedded_parent
from storage.library import name_of
from storage.model_config import ModelConfig
from storage.params import Params
from storage.paths import Paths
from storage.records import Attention, Ffn
from storage.targets import Target
from tasks.puzzle.blocks import Block
from tasks.puzzle.device import Compute, compute
from tasks.puzzle.hardware import device_named
from tasks.puzzle.head import Head, compare_with_parent
from tasks.puzzle.plan import Estimate, Planner, Rates, Work
from tasks.puzzle.rotary import rotary_for
from tasks.puzzle.timing import machine
from tasks.puzzle.variants import attention_variants, ffn_variants, parent_attention, parent_ffn

_SECONDS = 6.0
"""Of each rate's timing."""
_CHILDREN = 24
_STREAMS = 8
_OF_PEAK, _OF_BANDWIDTH = 0.4, 0.8
"""What training and scoring in torch reach of a data sheet; a guess that `Plan.machine` names."""
_LARGEST, _LONGEST = 60_000_000, 512
"""Parameters of the block that is timed, and tokens: larger ones reach the same rate."""
_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Plan:
    """Estimates of all stages; bytes of the activation cache in both modes, and whether params ask for rolling."""

    parent: str
    machine: str
    device: str
    stages: tuple[Estimate, ...]
    took: dict[str, float]
    materialised_bytes: float
    rolling_bytes: float
    rolling: bool
    free_disk_bytes: float


def plan(params: Params, config_json: Path | None, paths: Paths) -> Plan:
    """Time this machine and estimate every stage.

    Args:
        params: with `auto` resolved for this machine.
        config_json: the parent's; None looks at the prepared parent, then at prepare_parent.source.
        paths: where artifacts will lie: their disk is timed.

    Raises:
        InputError: no config.json can be had without fetching the parent, or its architecture is not supported.
    """
    name, config = _parent(params, config_json, paths)
    work = _work(params, config)
    paths.root.mkdir(parents=True, exist_ok=True)
    rates, what = _rates(config, params, paths.root)
    planner = Planner(config, work, rates)
    shares = {key: _share(target) for key, target in params.targets.items()}
    status = os.statvfs(paths.root)
    return Plan(
        parent=name,
        machine=what,
        device=params.run.device,
        stages=tuple(planner.stages(shares)),
        took=read_json(paths.seconds, "dvc repro") if paths.seconds.is_file() else {},
        materialised_bytes=planner.materialised_bytes,
        rolling_bytes=planner.rolling_bytes,
        rolling=work.rolling,
        free_disk_bytes=float(status.f_bavail * status.f_frsize),
    )


def _rates(config: ModelConfig, params: Params, folder: Path) -> tuple[Rates, str]:
    """This machine's, timed; where a GPU is asked for and none is here, those of a data sheet."""
    if params.run.device.startswith("cuda") and not torch.cuda.is_available():
        device = device_named(params.benchmark_throughput.hardware)
        flops = _OF_PEAK * device.peak_flops["bfloat16"]
        float32 = _OF_PEAK * device.peak_flops["float32"]
        rates = Rates(flops, flops, float32, _OF_BANDWIDTH * device.memory_bandwidth, _disk(folder), _start())
        return rates, f"{device.description} ({_OF_PEAK:.0%} of the data sheet's bfloat16 peak, assumed, not timed)"
    device_here = compute(params.run.device, params.run.dtype, params.run.threads)
    return calibrate(config, params, device_here, folder), f"{machine(device_here.device)}, rates timed just now"


def _parent(params: Params, config_json: Path | None, paths: Paths) -> tuple[str, ModelConfig]:
    source = params.prepare_parent.source
    if config_json is not None:
        return str(config_json), ModelConfig.from_hf(read_json(config_json, "the download"), str(config_json))
    if source == f"package:{PACKAGE}":
        return source, ModelConfig.from_hf(GgufModel(embedded_parent()[0]).config(), source)
    if (Path(source) / "config.json").is_file():
        return source, ModelConfig.from_hf(read_json(Path(source) / "config.json", "the download"), source)
    raise InputError(
        f"prepare_parent.source {source} is not here yet; give its geometry with --parent CONFIG_JSON (its config.json "
        "alone, no weights)"
    )


_SIZES: dict[str, float] = {"gguf-f32": 2.0, "gguf-q8_0": 17 / 32}
"""Of an exported form against 16 bit; Q8_0 has 34 bytes for 32 values."""


def _share(target: Target) -> float:
    """Block parameters that a child keeps, as far as its limits say."""
    shares = [
        limit.at_most_ratio
        for limit in target.constraints.values()
        if limit.metric in ("block_params", "params") and limit.at_most_ratio
    ]
    return min([1.0, *shares])


def _work(params: Params, config: ModelConfig) -> Work:
    corpus, bld, score, gkd = params.prepare_corpus, params.distill_blocks, params.score_blocks, params.distill_child
    benchmark, evaluate = params.benchmark_throughput, params.evaluate_child
    prefills = decodes = 0.0
    for scenario in benchmark.scenarios:
        inputs, outputs = map(int, scenario.split("/"))
        for batch in benchmark.batches:
            prefills += batch * (inputs * (benchmark.repeats + 1) + inputs + outputs / 2)
            decodes += 16 * benchmark.repeats + 1
    attentions = attention_variants(config, bld.linear)
    ffns = ffn_variants(config, bld.ffn_ratios, bld.width_multiple, bld.linear)
    variants: list[Attention | Ffn] = [*attentions[1:], *ffns[1:]]  # behind the parent's own
    taken = [bld.tokens_of(name_of(of)) for of in variants if of.kind != "no_op"]
    bld_tokens = sum(taken) / len(taken)
    return Work(
        seq_len=corpus.seq_len,
        train_tokens=corpus.train_tokens,
        calibration_tokens=corpus.calibration_tokens,
        validation_tokens=corpus.validation_tokens,
        cache_bytes=_BYTES[params.cache_activations.dtype],
        compute_bytes=_BYTES[params.run.dtype],
        rolling=params.cache_activations.rolling,
        kept_boundaries=len({0, config.num_blocks, *params.cache_activations.keep}),
        workers=params.run.workers,
        attentions=attentions,
        ffns=ffns,
        spans=bld.spans,
        importance_tokens=min(bld.importance_tokens, bld.used_tokens),
        fit_tokens=bld.fit_tokens,
        bld_tokens=bld_tokens,
        bld_read_tokens=bld.used_tokens,
        bld_checks=bld_tokens / (bld.check_steps * bld.sequences_per_step * corpus.seq_len) if bld.check_steps else 0.0,
        bld_sequences_per_step=bld.sequences_per_step,
        bld_held_out_tokens=bld.held_out_tokens,
        score_tokens=score.tokens,
        initial_score_tokens=score.initial_tokens,
        blocks_per_group=score.blocks_per_group,
        gkd_tokens=gkd.tokens,
        gkd_sequences_per_step=gkd.sequences_per_step,
        gkd_held_out_tokens=gkd.held_out_tokens,
        gkd_checkpoint_steps=gkd.checkpoint_steps,
        evaluate_tokens=evaluate.tokens,
        baseline_tokens=evaluate.baseline_tokens,
        num_baselines=4 + params.search_baselines.random_seeds,
        export_tokens=evaluate.export_tokens,
        num_ggufs=sum(one.startswith("gguf-") for one in params.export_child.formats),
        child_export_ratio=sum(_SIZES.get(one, 1.0) for one in params.export_child.formats),
        parent_export_ratio=sum(_SIZES.get(one, 1.0) for one in params.export_parent.formats),
        export_shard_bytes=params.export_child.max_shard_gib * 2**30,
        benchmark_prefill_tokens=round(prefills),
        benchmark_decode_steps=round(decodes),
    )


def calibrate(config: ModelConfig, params: Params, device: Compute, folder: Path) -> Rates:
    """Rates of this machine, all workers at once as in a stage; about a minute on two cores."""
    workers, threads = params.run.workers, params.run.threads
    tokens = min(params.prepare_corpus.seq_len, _LONGEST)
    timed = _small_enough(config)
    vocabulary = min(config.vocab_size, 16_384)
    return Rates(
        block_flops=_together(workers, threads, lambda: _blocks(timed, tokens, device)),
        head_flops=_together(workers, threads, lambda: _heads(timed.hidden_size, vocabulary, device)),
        float32_flops=_together(workers, threads, lambda: _products(timed.intermediate_size, device)),
        memory_bytes_per_s=_together(1, threads, lambda: _memory(device)),
        disk_bytes_per_s=_disk(folder),
        start_seconds=_start(),
    )


def _small_enough(config: ModelConfig) -> ModelConfig:
    """The geometry itself, or one of the same kind that fits into memory several times."""
    size = 3 * config.hidden_size * config.intermediate_size
    if size <= _LARGEST:
        return config
    return replace(
        config, hidden_size=2048, num_heads=16, num_kv_heads=8, head_dim=128, intermediate_size=8192, num_blocks=1
    )


def _together(workers: int, threads: int, make: Callable[[], Iterator[float]]) -> float:
    """The sum over workers of work per second; `make` yields the work of each call."""
    done = [0.0] * workers

    def run(index: int) -> None:
        torch.set_num_threads(threads)
        calls = make()
        next(calls)  # the first one warms up
        start, total = time.perf_counter(), 0.0
        while (elapsed := time.perf_counter() - start) < _SECONDS:
            total += next(calls)
        done[index] = total / elapsed

    ready = [threading.Thread(target=run, args=(index,)) for index in range(workers)]
    for thread in ready:
        thread.start()
    for thread in ready:
        thread.join()
    return sum(done)


def _synchronised(device: Compute, value: float) -> float:
    if device.device.type == "cuda":
        torch.cuda.synchronize(device.device)
    return value


def _blocks(config: ModelConfig, seq_len: int, device: Compute) -> Iterator[float]:
    """FLOPs of a parent block on a sequence, forward, for several candidates in turn before the next block."""
    with torch.device(device.device):
        blocks = [Block(config, parent_attention(config), parent_ffn(config)).to(device.dtype) for _ in range(4)]
    hidden = torch.randn(1, seq_len, config.hidden_size).to(device.device, device.dtype)
    rotary = rotary_for(config, seq_len, hidden)
    matrices = sum(parameter.numel() for parameter in blocks[0].parameters() if parameter.dim() > 1)
    attended = 2.0 * seq_len * config.num_heads * config.head_dim
    with torch.inference_mode():
        while True:
            for block in [block for block in blocks for _ in range(_STREAMS)]:
                block(hidden, rotary)
                yield _synchronised(device, seq_len * (2.0 * matrices + attended))


def _heads(hidden_size: int, vocabulary: int, device: Compute) -> Iterator[float]:
    """FLOPs of comparing children's logits with the parent's, which are computed twice.

    Logits spread as a model's do: with wider ones most probabilities are subnormal numbers, eight times as slow to
    compute with (measured on a CPU with AMX).
    """
    weight = torch.randn(vocabulary, hidden_size).mul_(3 / hidden_size**0.5).to(device.device, device.dtype)
    head = Head(torch.ones(hidden_size, device=device.device, dtype=device.dtype), weight, 1e-5)
    parent, *children = torch.randn(1 + _CHILDREN, 1, 257, hidden_size).to(device.device, device.dtype)
    tokens = torch.zeros(1, 257, dtype=torch.long, device=device.device)
    with torch.inference_mode():
        while True:
            compare_with_parent(head, tokens, parent, children)
            yield _synchronised(device, (2 + _CHILDREN) * 256 * 2.0 * hidden_size * vocabulary)


def _products(width: int, device: Compute) -> Iterator[float]:
    """FLOPs of a Gram matrix in float32, as the closed-form start sums them up."""
    features = torch.randn(2_048, width, device=device.device)
    while True:
        features.T @ features
        yield _synchronised(device, 2.0 * 2_048 * width**2)


def _memory(device: Compute) -> Iterator[float]:
    """Bytes of adding one large vector to another: two are read, one is written."""
    one, other = (torch.ones(1 << 24, device=device.device) for _ in range(2))
    while True:
        one.add_(other)
        yield _synchronised(device, 3.0 * 4 * one.numel())


def _disk(folder: Path) -> float:
    """Bytes/s of writing a file to the disk of the artifacts and reading it for its checksum, both counted."""
    block = os.urandom(1 << 24)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".plan-") as file:
        start = time.perf_counter()
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        sha256(Path(file.name))
        return 2.0 * 16 * len(block) / (time.perf_counter() - start)


def _start() -> float:
    """Seconds of a stage that has nothing to do: its imports in a process, its flow run, DVC's share."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import flows.search_architecture, tasks.score_blocks"], check=True)
    return 1.3 * (time.perf_counter() - start) + 1.0
