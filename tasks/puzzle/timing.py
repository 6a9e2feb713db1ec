"""Measured milliseconds of a model's components with torch on the device at hand.

A component's cost is the difference between stacks with N and 2N copies of it, everything else alike: in both
stacks the other subblock of every block is the parent's, so weights stream from memory as they do in a real model
instead of resting in a cache. Stacks are timed in turn (A B A B ...) and the median of the paired differences counts.
Decoding is timed at the scenario's mean context (input + output / 2), as one step of the whole batch.
"""

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from storage.model_config import ModelConfig
from storage.records import Attention, Ffn
from tasks.puzzle.blocks import Block, RMSNorm
from tasks.puzzle.child import DeciLMForCausalLM
from tasks.puzzle.device import Compute
from tasks.puzzle.rotary import RotaryEmbedding
from tasks.puzzle.variants import parent_attention, parent_ffn

ENGINE = "torch"
"""The engine that these timings are of."""


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens and sequences at once."""

    input_tokens: int
    output_tokens: int
    batch: int

    @classmethod
    def of(cls, scenario: str, batch: int) -> Self:
        """From a scenario such as `128/128`."""
        input_tokens, _, output_tokens = scenario.partition("/")
        return cls(int(input_tokens), int(output_tokens), batch)

    @property
    def mean_context(self) -> int:
        """Tokens in the KV cache halfway through decoding."""
        return self.input_tokens + self.output_tokens // 2


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of prefill and of one decode step, and their spread (interquartile range / median)."""

    prefill_ms: float
    decode_ms: float
    spread: float


class Stack(nn.Module):
    """Blocks with random weights, and the two phases to time."""

    def __init__(self, config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]], compute: Compute) -> None:
        super().__init__()
        with_attention = [attention.kind == "gqa" for attention, _ in blocks]
        self.layers = nn.ModuleList(
            Block(config, attention, ffn, cache_index=sum(with_attention[:index]))
            for index, (attention, ffn) in enumerate(blocks)
        ).to(compute.device, compute.dtype)
        self.rotary = RotaryEmbedding(config)
        self._hidden_size = config.hidden_size
        self._compute = compute

    def _run(self, tokens: int, batch: int, cache: DynamicCache, position: int) -> None:
        hidden = torch.full(
            (batch, tokens, self._hidden_size), 0.5, dtype=self._compute.dtype, device=self._compute.device
        )
        rotary = self.rotary(hidden, torch.arange(position, position + tokens, device=hidden.device)[None])
        for block in self.layers:
            hidden = block(hidden, rotary, None, cache)

    def prefill(self, work: Workload) -> DynamicCache:
        """Fill a cache with the input."""
        cache = DynamicCache()
        self._run(work.input_tokens, work.batch, cache, 0)
        return cache

    def at_context(self, work: Workload) -> DynamicCache:
        """A cache at the mean context."""
        cache = DynamicCache()
        self._run(work.mean_context, work.batch, cache, 0)
        return cache

    def decode(self, work: Workload, cache: DynamicCache) -> None:
        """One step; the cache goes back to its length after it."""
        self._run(1, work.batch, cache, work.mean_context)
        cache.crop(-1)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time the calls in turn, `repeats` rounds after one that does not count; name -> milliseconds of each round."""
    for call in calls.values():
        call()
    rounds = [{name: milliseconds(call, device) for name, call in calls.items()} for _ in range(repeats)]
    return {name: [one[name] for one in rounds] for name in calls}


def phases(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, steps: int = 16
) -> dict[str, list[float]]:
    """Time calls whose names tell the phase: a decode step is short and noisy, so it gets `steps` times the rounds."""
    decode = {name: call for name, call in calls.items() if "decode" in name}
    prefill = {name: call for name, call in calls.items() if "decode" not in name}
    return interleaved(prefill, repeats, device) | interleaved(decode, steps * repeats, device)


def time_subblock(
    config: ModelConfig, variant: Attention | Ffn, work: Workload, compute: Compute, copies: int, repeats: int
) -> Timing:
    """Milliseconds of one copy of a subblock variant in a stack of parent blocks.

    Args:
        config: geometry of the parent.
        variant: attention or FFN variant to time; a no-op costs 0 by definition and is not timed.
        work: lengths and batch.
        compute: device and dtype.
        copies: N; the stacks hold 2N blocks.
        repeats: rounds.
    """
    if isinstance(variant, Attention):
        with_it, without = (variant, parent_ffn(config)), (Attention("no_op"), parent_ffn(config))
    else:
        with_it, without = (parent_attention(config), variant), (parent_attention(config), Ffn("no_op"))
    with torch.inference_mode():
        full = Stack(config, [with_it] * (2 * copies), compute)
        half = Stack(config, [with_it, without] * copies, compute)
        caches = {stack: stack.at_context(work) for stack in (full, half)}
        rounds = phases(
            {
                "prefill 2N": lambda: full.prefill(work),
                "prefill N": lambda: half.prefill(work),
                "decode 2N": lambda: full.decode(work, caches[full]),
                "decode N": lambda: half.decode(work, caches[half]),
            },
            repeats,
            compute.device,
        )
    prefill = [(two - one) / copies for two, one in zip(rounds["prefill 2N"], rounds["prefill N"], strict=True)]
    decode = [(two - one) / copies for two, one in zip(rounds["decode 2N"], rounds["decode N"], strict=True)]
    return Timing(max(0.0, statistics.median(prefill)), max(0.0, statistics.median(decode)), spread(decode))


def model_calls(model: DeciLMForCausalLM, work: Workload, compute: Compute) -> dict[str, Callable[[], object]]:
    """`prefill` and `decode` (one greedy step at the mean context) of a whole model, ready to be timed."""
    prompt = torch.zeros(work.batch, work.input_tokens, dtype=torch.long, device=compute.device)
    step = prompt[:, :1]
    cache = DynamicCache()
    model(
        input_ids=prompt[:, :1].expand(-1, work.mean_context), past_key_values=cache, use_cache=True, logits_to_keep=1
    )

    def decode() -> None:
        logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        logits.argmax(-1)
        cache.crop(-1)

    return {"prefill": lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1), "decode": decode}


def time_models(
    models: Mapping[str, DeciLMForCausalLM], work: Workload, repeats: int, compute: Compute, steps: int = 16
) -> dict[str, dict[str, list[float]]]:
    """Time whole models end to end, in turn (:func:`phases`): name -> phase -> milliseconds of each round."""
    with torch.inference_mode():
        ready = {name: model_calls(model, work, compute) for name, model in models.items()}
        calls = {f"{name} {phase}": call for name, both in ready.items() for phase, call in both.items()}
        rounds = phases(calls, repeats, compute.device, steps)
    return {name: {phase: rounds[f"{name} {phase}"] for phase in both} for name, both in ready.items()}


def time_outside(config: ModelConfig, work: Workload, compute: Compute, repeats: int) -> tuple[Timing, Timing]:
    """Milliseconds of what every model has besides its blocks: embedding; head (norm, last logits)."""
    table = torch.randn(config.vocab_size, config.hidden_size).to(compute.device, compute.dtype)
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps).to(compute.device, compute.dtype)
    last = torch.randn(work.batch, 1, config.hidden_size).to(compute.device, compute.dtype)
    prompt = torch.zeros(work.batch, work.input_tokens, dtype=torch.long, device=compute.device)
    # a buffer larger than any cache, read between two heads: in a model, blocks evict the head's weights
    evict = torch.ones(1 << 25, device=compute.device)

    def head() -> Tensor:
        return functional.linear(norm(last), table).argmax(-1)

    with torch.inference_mode():
        rounds = interleaved(
            {
                "embedding prefill": lambda: functional.embedding(prompt, table),
                "embedding decode": lambda: functional.embedding(prompt[:, :1], table),
                "evict": lambda: evict.sum(),
                "head": head,
            },
            repeats,
            compute.device,
        )
    median = {name: statistics.median(values) for name, values in rounds.items()}
    return (
        Timing(median["embedding prefill"], median["embedding decode"], spread(rounds["embedding decode"])),
        Timing(median["head"], median["head"], spread(rounds["head"])),
    )


def line(sizes: Sequence[int], milliseconds: Sequence[float]) -> Callable[[int], float]:
    """The Theil-Sen line (median of pairwise slopes) through points of different sizes, never below 0."""
    points = list(zip(sizes, milliseconds, strict=True))
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2)]
    slope = max(0.0, statistics.median(slopes))
    offset = statistics.median(y - slope * x for x, y in points)
    return lambda size: max(0.0, offset + slope * size)


def spread(values: Sequence[float]) -> float:
    """Interquartile range relative to the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle if middle > 0 else 0.0


def software() -> str:
    """Versions of what computes."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def machine(device: torch.device) -> str:
    """The GPU that `device` names, else the processor (with family and model, since cloud machines hide the name)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"
