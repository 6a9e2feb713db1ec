"""This machine: its name, the versions of its software, and the meaning of `auto` in the params of `run`."""

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from storage.fields import resolved
from storage.model_config import ModelConfig
from storage.params import Params
from storage.records import ELEMENT_BYTES
from storage.sections import CacheActivations, EvaluateChild, ScoreBlocks
from tasks.puzzle.model.device import gpu_bytes, resolve
from tasks.puzzle.search_space import block_variants

_CPU_BATCH_TOKENS = 2_048
_GPU_BYTES_PER_TOKEN = 2_500_000
"""Memory of a GPU for each token of a forward pass, 32,768 tokens on 80 GB: a token takes 0.15 MB in a block of an 8B,
0.5 MB in one of a 405B."""
_CPU_BLOCKS, _MOST_BLOCKS = 3, 8

Batched = TypeVar("Batched", CacheActivations, ScoreBlocks, EvaluateChild)


def on_this_machine(params: Params) -> Params:
    """`params` with what `auto` means on this machine, device, dtype and batches: keys of pieces hold no `auto`."""
    device, dtype = resolve(params.run.device, params.run.dtype)
    seq_len, score = params.prepare_corpus.seq_len, params.score_blocks
    is_cpu = torch.device(device).type == "cpu"
    tokens = _CPU_BATCH_TOKENS if is_cpu else _batch_tokens(gpu_bytes(torch.device(device)))
    length = score.length(seq_len)  # fewer are scored at once than cached: several models go through the head
    scored = math.gcd(score.tokens // length, score.initial_tokens // length, score.depth_tokens // length)
    return params.model_copy(
        update={
            "run": params.run.model_copy(update={"device": device, "dtype": dtype}),
            "cache_activations": _with_batch(params.cache_activations, tokens // seq_len),
            "score_blocks": _with_batch(score, _divisor(scored, tokens // (4 if is_cpu else 2) // length)),
            "evaluate_child": _with_batch(params.evaluate_child, tokens // 2 // seq_len),
        }
    )


def _batch_tokens(memory_bytes: int) -> int:
    """The tokens of a forward pass on a GPU: a power of two, the same whatever its driver takes of the memory."""
    return 1 << max(0, (memory_bytes // _GPU_BYTES_PER_TOKEN).bit_length() - 1)


def _with_batch(section: Batched, sequences: int) -> Batched:
    """A section with a number in place of `auto`."""
    if section.sequences_per_batch != "auto":
        return section
    return section.model_copy(update={"sequences_per_batch": max(1, sequences)})


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is no larger than `most`, or 1."""
    return max((divisor for divisor in range(1, most + 1) if number % divisor == 0), default=1)


def blocks_per_group(params: Params, config: ModelConfig) -> int:
    """Count the neighbouring blocks whose replacements go through the parent together.

    Their states fill a quarter of a GPU at most; in rolling mode they begin at boundaries that are on disk together.

    Args:
        params: the project's params, with `auto` resolved for this machine.
        config: the parent's geometry.
    """
    size_of_params, device = params.score_blocks.blocks_per_group, torch.device(params.run.device)
    if size_of_params != "auto":
        size = size_of_params
    elif device.type == "cpu":
        size = _CPU_BLOCKS
    else:
        at_once = params.run.workers * bytes_of_replacements(params, config)
        size = max(1, min(_MOST_BLOCKS, gpu_bytes(device) // (4 * at_once)))
    return min(size, 1 + max((1, *params.distill_blocks.spans))) if params.cache_activations.rolling else size


def bytes_of_replacements(params: Params, config: ModelConfig) -> int:
    """Bytes that the states of all replacements of a block take, of one batch that is scored."""
    score, (attentions, ffns) = params.score_blocks, block_variants(config, params.distill_blocks)
    tokens = resolved(score.sequences_per_batch) * score.length(params.prepare_corpus.seq_len)
    return (len(attentions) + len(ffns)) * tokens * config.hidden_size * ELEMENT_BYTES[params.run.dtype]


def software() -> str:
    """Versions of torch and transformers, as tables have them."""
    import transformers  # a second that stages without tables save

    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def machine(device: torch.device) -> str:
    """The GPU that `device` names, else the processor (with family and model, since cloud machines hide the name)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    facts = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


@dataclass(frozen=True)
class Memory:
    """Bytes of memory of a machine, and of the device that its stages compute on (the same on a CPU); its GPUs."""

    host: int
    device: int
    gpus: int = 0


def memory_of(device: str) -> Memory:
    """The memory of this machine (what its container may take of it), and of the GPU that `device` names."""
    limit = Path("/sys/fs/cgroup/memory.max")
    limits = [limit.read_text(encoding="ascii").strip()] if limit.is_file() else []
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = min([physical, *(int(text) for text in limits if text.isdecimal())])
    resolved = torch.device(device)
    if resolved.type == "cpu" or (resolved.index or 0) >= torch.cuda.device_count():  # prepare_compute refuses it
        return Memory(host, host)
    return Memory(host, torch.cuda.get_device_properties(resolved).total_memory, torch.cuda.device_count())
