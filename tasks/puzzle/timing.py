"""Measured milliseconds of a model's components with torch on the device at hand.

A component's cost is the difference between stacks with N and 2N copies of it, everything else alike: in both
stacks the other subblock of every block is the parent's, so weights stream from memory as they do in a real model
instead of resting in a cache. Stacks are timed in turn (A B A B ...) and the median of the paired differences counts.
Decoding is timed at the scenario's mean context (input + output / 2), as one step of the whole batch.
"""

import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, Self, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

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


class KvCache:
    """Keys and values of every layer in buffers of `length` positions; the next ones go to `position`.

    Nothing is copied to make room, and a decode step that always goes to the same position can be a CUDA graph.
    """

    def __init__(self, length: int) -> None:
        self.position = 0
        self._length = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Put keys and values [batch, kv heads, tokens, head_dim] at `position`; all that are there up to them."""
        if layer not in self._layers:
            batch, heads, _, head_dim = key.shape
            shape = (batch, heads, self._length, head_dim)
            self._layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        end = self.position + key.shape[2]
        keys, values = self._layers[layer]
        keys[:, :, self.position : end] = key
        values[:, :, self.position : end] = value
        return keys[:, :, :end], values[:, :, :end]


class Stack:
    """What is timed: blocks, over hidden states, or between embedding and head, over token ids."""

    def __init__(self, config: ModelConfig, layers: Sequence[nn.Module], work: Workload, compute: Compute) -> None:
        """`layers` compute in `compute`; the cache gets the context of `work` and room for one token behind it."""
        self._layers = layers
        self._work, self._compute = work, compute
        self._cache = KvCache(work.mean_context + 1)
        places = ((work.input_tokens, 0), (work.mean_context, 0), (1, work.mean_context))
        self._inputs = {tokens: self._input(config, tokens) for tokens, _ in places}
        rotary, like = RotaryEmbedding(config), torch.empty(0, dtype=compute.dtype, device=compute.device)
        self._rotary = {  # made once: a CUDA graph may copy nothing from the CPU
            (tokens, position): rotary(like, torch.arange(position, position + tokens, device=compute.device)[None])
            for tokens, position in places
        }
        self.run(work.mean_context)

    def _input(self, config: ModelConfig, tokens: int) -> Tensor:
        shape = (self._work.batch, tokens, config.hidden_size)
        return torch.full(shape, 0.5, dtype=self._compute.dtype, device=self._compute.device)

    def _hidden(self, inputs: Tensor) -> Tensor:
        return inputs

    def run(self, tokens: int, position: int = 0) -> Tensor:
        """Hidden states behind `tokens` tokens at `position`."""
        hidden = self._hidden(self._inputs[tokens])
        self._cache.position = position
        for block in self._layers:
            hidden = block(hidden, self._rotary[tokens, position], None, self._cache)
        return hidden

    def calls(self) -> dict[str, Callable[[], object]]:
        """`prefill` of the input and `decode`, one step behind the mean context, ready to be timed again and again."""
        both: dict[str, Callable[[], object]] = {
            "prefill": lambda: self.run(self._work.input_tokens),
            "decode": lambda: self.run(1, self._work.mean_context),
        }
        return {phase: captured(call, self._compute.device) for phase, call in both.items()}


_STRIDE = 7_919
"""Between token ids that follow each other: no two rows of the embedding are neighbours."""


class Whole(Stack):
    """A whole model: token ids in, the last position's likeliest token out."""

    def __init__(self, config: ModelConfig, model: DeciLMForCausalLM, work: Workload, compute: Compute) -> None:
        self._model = model
        super().__init__(config, list(model.model.layers), work, compute)

    def _input(self, config: ModelConfig, tokens: int) -> Tensor:
        ids = torch.arange(tokens, device=self._compute.device) * _STRIDE % config.vocab_size
        return ids.expand(self._work.batch, -1)

    def _hidden(self, inputs: Tensor) -> Tensor:
        embedded: Tensor = self._model.model.embed_tokens(inputs)
        return embedded

    def logits(self, tokens: int, position: int = 0) -> Tensor:
        """Of the last position, [batch, 1, vocabulary]."""
        found: Tensor = self._model.lm_head(self._model.model.norm(super().run(tokens, position)[:, -1:]))
        return found

    def run(self, tokens: int, position: int = 0) -> Tensor:
        """The token that follows each sequence, [batch, 1]."""
        return self.logits(tokens, position).argmax(-1)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """On a GPU a CUDA graph of the call, so that its kernels cost one launch; elsewhere the call itself."""
    if device.type != "cuda":
        return call
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # what is made at a first call must not be part of the graph
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, _captured: Callable[[], object]) -> None:
    """Holds the captured call, and with it the weights, cache and inputs whose addresses the graph has."""
    graph.replay()


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


def phases(calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time calls whose names tell the phase: a decode step is short and noisy, so it gets 16 times the rounds."""
    decode = {name: call for name, call in calls.items() if "decode" in name}
    prefill = {name: call for name, call in calls.items() if "decode" not in name}
    return interleaved(prefill, repeats, device) | interleaved(decode, 16 * repeats, device)


class Components:
    """Times a model's components one after another, at one speed of the machine.

    A stack of parent blocks, the reference, is timed in every round with what is timed, and each round is scaled to the
    reference's first speed: on a shared machine components that are timed minutes apart would not add up else.
    """

    def __init__(self, config: ModelConfig, work: Workload, compute: Compute, copies: int, repeats: int) -> None:
        """`copies` is N: stacks hold 2N and N copies of a subblock; `repeats`: rounds of each."""
        self._config, self._work, self._compute = config, work, compute
        self._copies, self._repeats = copies, repeats
        self._parent = (parent_attention(config), parent_ffn(config))
        with torch.inference_mode():
            reference = self._stack([self._parent] * copies).calls()
            self._reference = {f"reference {phase}": call for phase, call in reference.items()}
            first = phases(self._reference, repeats, compute.device)
        self._speed = {name: statistics.median(rounds) for name, rounds in first.items()}

    def _stack(self, blocks: Sequence[tuple[Attention, Ffn]]) -> Stack:
        """Blocks with random weights."""
        with_attention = [attention.kind == "gqa" for attention, _ in blocks]
        layers = [
            Block(self._config, attention, ffn, cache_index=sum(with_attention[:index])).to(
                self._compute.device, self._compute.dtype
            )
            for index, (attention, ffn) in enumerate(blocks)
        ]
        return Stack(self._config, layers, self._work, self._compute)

    def _rounds(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Milliseconds of each round at the reference's first speed; names tell the phase (:func:`phases`)."""
        rounds = phases({**calls, **self._reference}, self._repeats, self._compute.device)
        scaled = {}
        for name in calls:
            reference = "reference decode" if "decode" in name else "reference prefill"
            pace = [self._speed[reference] / now for now in rounds[reference]]
            scaled[name] = [one * factor for one, factor in zip(rounds[name], pace, strict=True)]
        return scaled

    def subblock(self, variant: Attention | Ffn) -> Timing:
        """One copy of a subblock variant in a stack of parent blocks; a no-op costs 0 by definition."""
        if variant.kind == "no_op":
            return Timing(0.0, 0.0, 0.0)
        attention, ffn = self._parent
        if isinstance(variant, Attention):
            with_it, without = (variant, ffn), (Attention("no_op"), ffn)
        else:
            with_it, without = (attention, variant), (attention, Ffn("no_op"))
        with torch.inference_mode():
            full = self._stack([with_it] * (2 * self._copies)).calls()
            half = self._stack([with_it, without] * self._copies).calls()
            calls = {f"2N {phase}": call for phase, call in full.items()}
            rounds = self._rounds(calls | {f"N {phase}": call for phase, call in half.items()})
        prefill, decode = (
            [(two - one) / self._copies for two, one in zip(rounds[f"2N {phase}"], rounds[f"N {phase}"], strict=True)]
            for phase in ("prefill", "decode")
        )
        return Timing(max(0.0, statistics.median(prefill)), max(0.0, statistics.median(decode)), spread(decode))

    def outside(self) -> tuple[Timing, Timing]:
        """What every model has besides its blocks: embedding; head (norm, last logits)."""
        config, device, dtype = self._config, self._compute.device, self._compute.dtype
        table = torch.randn(config.vocab_size, config.hidden_size).to(device, dtype)
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps).to(device, dtype)
        last = torch.randn(self._work.batch, 1, config.hidden_size).to(device, dtype)
        prompt = torch.zeros(self._work.batch, self._work.input_tokens, dtype=torch.long, device=device)
        # a buffer larger than any cache, read between two heads: in a model, blocks evict the head's weights
        evict = torch.ones(1 << 25, device=device)
        calls: dict[str, Callable[[], object]] = {
            "embedding prefill": lambda: functional.embedding(prompt, table),
            "embedding decode": lambda: functional.embedding(prompt[:, :1], table),
            "evict decode": lambda: evict.sum(),
            "head decode": lambda: functional.linear(norm(last), table).argmax(-1),
        }
        with torch.inference_mode():
            rounds = self._rounds({name: captured(call, device) for name, call in calls.items()})
        median = {name: statistics.median(values) for name, values in rounds.items()}
        return (
            Timing(median["embedding prefill"], median["embedding decode"], spread(rounds["embedding decode"])),
            Timing(median["head decode"], median["head decode"], spread(rounds["head decode"])),
        )

    def whole(self, model: DeciLMForCausalLM) -> Timing:
        """A whole model, end to end."""
        with torch.inference_mode():
            rounds = self._rounds(Whole(self._config, model, self._work, self._compute).calls())
        prefill, decode = (statistics.median(rounds[phase]) for phase in ("prefill", "decode"))
        return Timing(prefill, decode, max(map(spread, rounds.values())))


def time_models(
    config: ModelConfig,
    models: Mapping[str, DeciLMForCausalLM],
    work: Workload,
    repeats: int,
    compute: Compute,
) -> dict[str, dict[str, list[float]]]:
    """Time whole models end to end, in turn (:func:`phases`): name -> phase -> milliseconds of each round."""
    with torch.inference_mode():
        ready = {name: Whole(config, model, work, compute).calls() for name, model in models.items()}
        calls = {f"{name} {phase}": call for name, both in ready.items() for phase, call in both.items()}
        rounds = phases(calls, repeats, compute.device)
    return {name: {phase: rounds[f"{name} {phase}"] for phase in both} for name, both in ready.items()}


K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Fit(Generic[K]):
    """Parts that were scaled, each phase by one factor, so that a model's sum is what it was measured to take."""

    parts: dict[K, Timing]
    prefill_factor: float
    decode_factor: float

    @property
    def text(self) -> str:
        """For the table."""
        factors = f"prefill x {self.prefill_factor:.3f} and decode x {self.decode_factor:.3f}"
        return f"; {factors}, so that the parent's parts sum to its measured time"


def fit_to_whole(parts: Mapping[K, Timing], counts: Mapping[K, int], whole: Timing) -> Fit[K]:
    """Correct timed parts by a model that was timed end to end; ratios between models stay as they were.

    Args:
        parts: every component's timing.
        counts: how often the timed model has each of them.
        whole: that model.
    """

    def factor(phase: str) -> float:
        return float(getattr(whole, phase) / math.fsum(n * getattr(parts[name], phase) for name, n in counts.items()))

    prefill, decode = factor("prefill_ms"), factor("decode_ms")
    scaled = {
        name: replace(part, prefill_ms=prefill * part.prefill_ms, decode_ms=decode * part.decode_ms)
        for name, part in parts.items()
    }
    return Fit(scaled, prefill, decode)


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
