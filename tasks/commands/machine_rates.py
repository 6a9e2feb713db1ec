"""Rates of this machine, timed in about a minute: blocks, head, float32 products, memory, disk, start of a stage.

In: a parent's geometry and the params of `run`. Out: rates for tasks/estimates/stage_estimates.py.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from storage.checkpoints import placed
from storage.files import sha256
from storage.model_config import ModelConfig
from storage.params import Params
from tasks.engines.machine import machine
from tasks.estimates.stage_estimates import Rates
from tasks.puzzle.costs.hardware import device_named
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.model.head import Head, compare_with_parent
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn

_SECONDS = 6.0
"""Length of each rate's timing."""
_CHILDREN = 24
"""Children whose logits are compared with the parent's at once."""
_STREAMS = 8
"""Candidates that a block computes in turn before the next block."""
_PEAK_SHARE, _BANDWIDTH_SHARE = 0.4, 0.8
"""Shares of a data sheet that training and scoring in torch reach; a guess that the plan names."""
_HOST_LINK = 20e9
"""Bytes/s from the host's memory to a GPU over PCIe 5.0 in one direction, pinned; assumed."""
_LARGEST, _LONGEST = 60_000_000, 512
"""Parameters of the block that is timed, and tokens: larger ones reach the same rate."""


def rates_of_machine(config: ModelConfig, params: Params, folder: Path) -> tuple[Rates, str]:
    """Return the rates of this machine, timed; where params name a GPU that this machine lacks, those of a data sheet.

    Args:
        config: the parent.
        params: the project's params, with `auto` resolved for this machine.
        folder: a folder on the disk of the artifacts.

    Returns:
        The rates, and the machine in words.
    """
    if params.run.device.startswith("cuda") and not torch.cuda.is_available():
        device = device_named(params.benchmark_throughput.hardware)
        rates = Rates(
            block_flops=_PEAK_SHARE * device.peak_flops["bfloat16"],
            head_flops=_PEAK_SHARE * device.peak_flops["bfloat16"],
            float32_flops=_PEAK_SHARE * device.peak_flops["float32"],
            memory_bytes_per_s=_BANDWIDTH_SHARE * device.memory_bandwidth,
            disk_bytes_per_s=_disk_rate(folder),
            read_bytes_per_s=_HOST_LINK,
            hash_bytes_per_s=_hash_rate(),
            start_seconds=_start_seconds(),
        )
        assumed = f"{_PEAK_SHARE:.0%} of the data sheet's bfloat16 peak, assumed, not timed; disk and sha256 timed here"
        return rates, f"{device.description} ({assumed})"
    compute = prepare_compute(params.run.device, params.run.dtype, params.run.threads)
    return calibrate(config, params, compute, folder), f"{machine(compute.device)}, rates timed just now"


def calibrate(config: ModelConfig, params: Params, compute: Compute, folder: Path) -> Rates:
    """Time this machine with all workers at once, as in a stage; it takes about a minute on two cores."""
    workers, threads = params.run.workers, params.run.threads
    tokens = min(params.prepare_corpus.seq_len, _LONGEST)
    timed = _small_enough(config)
    vocabulary = min(config.vocab_size, 16_384)
    return Rates(
        block_flops=_together(workers, threads, lambda: _blocks(timed, tokens, compute)),
        head_flops=_together(workers, threads, lambda: _heads(timed.hidden_size, vocabulary, compute)),
        float32_flops=_together(workers, threads, lambda: _products(timed.intermediate_size, compute)),
        memory_bytes_per_s=_together(1, threads, lambda: _memory_rate(compute)),
        disk_bytes_per_s=_disk_rate(folder),
        read_bytes_per_s=_together(1, threads, lambda: _reads(compute)),
        hash_bytes_per_s=_hash_rate(),
        start_seconds=_start_seconds(),
    )


def _small_enough(config: ModelConfig) -> ModelConfig:
    """Return the geometry itself, or a smaller one of the same kind that fits into memory several times."""
    size = 3 * config.hidden_size * config.intermediate_size
    if size <= _LARGEST:
        return config
    return replace(
        config, hidden_size=2048, num_heads=16, num_kv_heads=8, head_dim=128, intermediate_size=8192, num_blocks=1
    )


def _together(workers: int, threads: int, make: Callable[[], Iterator[float]]) -> float:
    """Measure work per second, summed over workers that run at the same time; `make` yields the work of each call."""
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


def _synchronised(compute: Compute, value: float) -> float:
    """Return the value, once the GPU has finished what it was given."""
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)
    return value


def _blocks(config: ModelConfig, seq_len: int, compute: Compute) -> Iterator[float]:
    """Yield FLOPs of a parent block on a sequence, forward, for several candidates in turn before the next block."""
    with torch.device(compute.device):
        blocks = [Block(config, parent_attention(config), parent_ffn(config)).to(compute.dtype) for _ in range(4)]
    hidden = torch.randn(1, seq_len, config.hidden_size).to(*compute)
    rotary = rotary_for(config, seq_len, hidden)
    matrices = sum(parameter.numel() for parameter in blocks[0].parameters() if parameter.dim() > 1)
    attended = 2.0 * seq_len * config.num_heads * config.head_dim
    with torch.inference_mode():
        while True:
            for block in [block for block in blocks for _ in range(_STREAMS)]:
                block(hidden, rotary)
                yield _synchronised(compute, seq_len * (2.0 * matrices + attended))


def _heads(hidden_size: int, vocabulary: int, compute: Compute) -> Iterator[float]:
    """Yield the FLOPs of comparing children's logits with the parent's; its product, in float32, counts as two.

    Logits spread as a model's do: with wider ones most probabilities are subnormal numbers, eight times as slow to
    compute with (measured on a CPU with AMX).
    """
    weight = torch.randn(vocabulary, hidden_size).mul_(3 / hidden_size**0.5).to(*compute)
    head = Head(torch.ones(hidden_size, device=compute.device, dtype=compute.dtype), weight, 1e-5)
    parent, *children = torch.randn(1 + _CHILDREN, 1, 257, hidden_size).to(*compute)
    tokens = torch.zeros(1, 257, dtype=torch.long, device=compute.device)
    with torch.inference_mode():
        while True:
            compare_with_parent(head, tokens, parent, children)
            yield _synchronised(compute, (2 + _CHILDREN) * 256 * 2.0 * hidden_size * vocabulary)


def _products(width: int, compute: Compute) -> Iterator[float]:
    """Yield the FLOPs of a Gram matrix in float32, as the closed-form start sums them up."""
    features = torch.randn(2_048, width, device=compute.device)
    while True:
        features.T @ features
        yield _synchronised(compute, 2.0 * 2_048 * width**2)


def _memory_rate(compute: Compute) -> Iterator[float]:
    """Yield the bytes of adding one large vector to another: two are read, one is written."""
    total, addend = torch.ones(1 << 24, device=compute.device), torch.ones(1 << 24, device=compute.device)
    while True:
        total.add_(addend)
        yield _synchronised(compute, 3.0 * 4 * total.numel())


def _reads(compute: Compute) -> Iterator[float]:
    """Yield the bytes of bringing a tensor of the page cache to the device."""
    tensor = torch.zeros(1 << 26, dtype=torch.bfloat16)
    while True:
        placed(tensor, *compute, copy=True)
        yield _synchronised(compute, 2.0 * tensor.numel())


def _hash_rate() -> float:
    """Measure bytes/s of sha256 on one thread."""
    block, start = bytes(1 << 27), time.perf_counter()
    hashlib.sha256(block).digest()
    return len(block) / (time.perf_counter() - start)


def _disk_rate(folder: Path) -> float:
    """Measure bytes/s of writing a file to the disk of the artifacts and reading it for its checksum, both counted."""
    block = os.urandom(1 << 24)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".plan-") as file:
        start = time.perf_counter()
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        sha256(Path(file.name))
        return 2.0 * 16 * len(block) / (time.perf_counter() - start)


def _start_seconds() -> float:
    """Measure the seconds of a stage that has nothing to compute: imports of a process, its flow run, and DVC."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import flows.search_architecture, tasks.score_blocks"], check=True)
    return 1.3 * (time.perf_counter() - start) + 1.0
