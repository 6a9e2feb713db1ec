"""Measured milliseconds of models and of their components with torch, on the device of this machine.

A component's cost is the difference between stacks with N and 2N copies of it, everything else alike: in both
stacks the other subblock of every block is the parent's, so weights stream from memory as they do in a real model
instead of resting in a cache. Stacks are timed in turn (A B A B ...) and the median of the paired differences counts.
Decoding is timed at the scenario's mean context (input + output / 2), as one step of the whole batch.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.checkpoints import Checkpoint
from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn
from tasks.engines.timings import Rounds, Timing, Workload, spread
from tasks.puzzle.model.blocks import Block, RMSNorm
from tasks.puzzle.model.child import DeciLMForCausalLM, build
from tasks.puzzle.model.device import Compute
from tasks.puzzle.model.kv_cache import KvCache
from tasks.puzzle.model.rotary import RotaryEmbedding
from tasks.puzzle.search_space import parent_attention, parent_ffn

ENGINE = "torch"
"""Name of the engine in tables."""


class Stack:
    """Blocks that are timed as a stack, over hidden states [batch, tokens, hidden]; a cache keeps the context."""

    def __init__(self, config: ModelConfig, layers: Sequence[nn.Module], workload: Workload, compute: Compute) -> None:
        """`layers` compute in `compute`; the cache gets the context of `workload` and room for one token behind it."""
        self._layers = layers
        self._workload, self._compute = workload, compute
        self._cache = KvCache(workload.context_at_midpoint + 1)
        passes = ((workload.input_tokens, 0), (workload.context_at_midpoint, 0), (1, workload.context_at_midpoint))
        self._inputs = {tokens: self._input(config, tokens) for tokens, _ in passes}
        rotary, like = RotaryEmbedding(config), torch.empty(0, dtype=compute.dtype, device=compute.device)
        self._rotary = {  # made once: a CUDA graph may copy nothing from the CPU
            (tokens, position): rotary(like, torch.arange(position, position + tokens, device=compute.device)[None])
            for tokens, position in passes
        }
        self.run(workload.context_at_midpoint)

    def _input(self, config: ModelConfig, tokens: int) -> Tensor:
        shape = (self._workload.batch, tokens, config.hidden_size)
        return torch.full(shape, 0.5, dtype=self._compute.dtype, device=self._compute.device)

    def _hidden(self, inputs: Tensor) -> Tensor:
        return inputs

    def run(self, tokens: int, position: int = 0) -> Tensor:
        """Compute the hidden states behind `tokens` tokens at `position`."""
        hidden = self._hidden(self._inputs[tokens])
        self._cache.position = position
        for block in self._layers:
            hidden = block(hidden, self._rotary[tokens, position], None, self._cache)
        return hidden

    def calls(self) -> dict[str, Callable[[], object]]:
        """Return `prefill` of the input and `decode`, one step behind the mean context, to be timed again and again."""
        both: dict[str, Callable[[], object]] = {
            "prefill": lambda: self.run(self._workload.input_tokens),
            "decode": lambda: self.run(1, self._workload.context_at_midpoint),
        }
        return {phase: captured(call, self._compute.device) for phase, call in both.items()}


_STRIDE = 7_919
"""Between token ids that follow each other: no two rows of the embedding are neighbours."""


class Whole(Stack):
    """A whole model: token ids in, the last position's likeliest token out."""

    def __init__(self, config: ModelConfig, model: DeciLMForCausalLM, workload: Workload, compute: Compute) -> None:
        self._model = model
        super().__init__(config, list(model.model.layers), workload, compute)

    def _input(self, config: ModelConfig, tokens: int) -> Tensor:
        ids = torch.arange(tokens, device=self._compute.device) * _STRIDE % config.vocab_size
        return ids.expand(self._workload.batch, -1)

    def _hidden(self, inputs: Tensor) -> Tensor:
        embedded: Tensor = self._model.model.embed_tokens(inputs)
        return embedded

    def logits(self, tokens: int, position: int = 0) -> Tensor:
        """Compute the logits of the last position, [batch, 1, vocabulary]."""
        logits: Tensor = self._model.lm_head(self._model.model.norm(super().run(tokens, position)[:, -1:]))
        return logits

    def run(self, tokens: int, position: int = 0) -> Tensor:
        """Return the token that follows each sequence, [batch, 1]."""
        return self.logits(tokens, position).argmax(-1)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a CUDA graph of the call on a GPU, so that its kernels cost one launch; elsewhere the call itself."""
    if device.type != "cuda":
        return call
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # what the first call makes must not be part of the graph
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, _captured: Callable[[], object]) -> None:
    """Replay a graph; the argument keeps the captured call alive: the graph has addresses of its weights and inputs."""
    graph.replay()


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Measure the wall time of one call, the device's queue included."""
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
    """Time the calls in turn, `repeats` rounds after one that does not count: name -> milliseconds of each round."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(milliseconds(call, device))
    return times


def phases(calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Time calls whose names contain the phase: a decode step is short and noisy, so it gets 16 times the rounds."""
    decode = {name: call for name, call in calls.items() if "decode" in name}
    prefill = {name: call for name, call in calls.items() if "decode" not in name}
    return interleaved(prefill, repeats, device) | interleaved(decode, 16 * repeats, device)


class Components:
    """Times a model's components one after another, at one speed of the machine.

    A stack of parent blocks, the reference, is timed in every round beside the component, and each round is scaled to
    the reference's first speed: on a shared machine, components timed minutes apart would otherwise not add up.
    """

    def __init__(self, config: ModelConfig, workload: Workload, compute: Compute, copies: int, repeats: int) -> None:
        """Time stacks of 2N and N copies of a subblock, N being `copies`, each in `repeats` rounds."""
        self._config, self._workload, self._compute = config, workload, compute
        self._copies, self._repeats = copies, repeats
        self._parent = (parent_attention(config), parent_ffn(config))
        with torch.inference_mode():
            reference = self._stack([self._parent] * copies).calls()
            self._reference = {f"reference {phase}": call for phase, call in reference.items()}
            first = phases(self._reference, repeats, compute.device)
        self._speed = {name: statistics.median(rounds) for name, rounds in first.items()}

    def _stack(self, blocks: Sequence[tuple[Attention, Ffn]]) -> Stack:
        """Make a stack of blocks with random weights."""
        with_attention = [attention.kind == "gqa" for attention, _ in blocks]
        layers = [
            Block(self._config, attention, ffn, cache_index=sum(with_attention[:index])).to(*self._compute)
            for index, (attention, ffn) in enumerate(blocks)
        ]
        return Stack(self._config, layers, self._workload, self._compute)

    def _rounds(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Measure each round in ms at the reference's first speed; names contain the phase (:func:`phases`)."""
        rounds = phases({**calls, **self._reference}, self._repeats, self._compute.device)
        scaled = {}
        for name in calls:
            reference = "reference decode" if "decode" in name else "reference prefill"
            pace = [self._speed[reference] / now for now in rounds[reference]]
            scaled[name] = [measured * factor for measured, factor in zip(rounds[name], pace, strict=True)]
        return scaled

    def subblock(self, variant: Attention | Ffn) -> Timing:
        """Time one copy of a subblock variant in a stack of parent blocks; a no-op costs 0 by definition."""
        if variant.kind == "no_op":
            return Timing(0.0, 0.0, 0.0)
        attention, ffn = self._parent
        if isinstance(variant, Attention):
            block, without = (variant, ffn), (Attention("no_op"), ffn)
        else:
            block, without = (attention, variant), (attention, Ffn("no_op"))
        with torch.inference_mode():
            full = self._stack([block] * (2 * self._copies)).calls()
            half = self._stack([block, without] * self._copies).calls()
            calls = {f"2N {phase}": call for phase, call in full.items()}
            rounds = self._rounds(calls | {f"N {phase}": call for phase, call in half.items()})
        prefill = self._per_copy(rounds["2N prefill"], rounds["N prefill"])
        decode = self._per_copy(rounds["2N decode"], rounds["N decode"])
        return Timing(max(0.0, statistics.median(prefill)), max(0.0, statistics.median(decode)), spread(decode))

    def _per_copy(self, full: Sequence[float], half: Sequence[float]) -> list[float]:
        """Return the milliseconds of one copy in each round, from stacks of 2N and N copies."""
        return [(longer - shorter) / self._copies for longer, shorter in zip(full, half, strict=True)]

    def outside(self) -> tuple[Timing, Timing]:
        """Time the embedding and the head (norm, logits of the last position), which every model has."""
        config, device, dtype = self._config, self._compute.device, self._compute.dtype
        table = torch.randn(config.vocab_size, config.hidden_size).to(device, dtype)
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps).to(device, dtype)
        last = torch.randn(self._workload.batch, 1, config.hidden_size).to(device, dtype)
        prompt = torch.zeros(self._workload.batch, self._workload.input_tokens, dtype=torch.long, device=device)
        # A buffer larger than any cache is read between two heads: in a model, blocks evict the head's weights.
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
        """Time a whole model, end to end."""
        with torch.inference_mode():
            rounds = self._rounds(Whole(self._config, model, self._workload, self._compute).calls())
        prefill, decode = statistics.median(rounds["prefill"]), statistics.median(rounds["decode"])
        return Timing(prefill, decode, max(map(spread, rounds.values())))


def load_model(
    checkpoint: Checkpoint, config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]], compute: Compute
) -> DeciLMForCausalLM:
    """Load a checkpoint whole into memory, as the class that parent and children share."""
    return build(config, blocks, {name: checkpoint.tensor(name) for name in checkpoint.files}, compute)


def time_models(
    config: ModelConfig,
    models: Mapping[str, DeciLMForCausalLM],
    workload: Workload,
    repeats: int,
    compute: Compute,
) -> dict[str, Rounds]:
    """Time whole models end to end, in turn (:func:`phases`)."""
    with torch.inference_mode():
        calls = {}
        for name, model in models.items():
            for phase, call in Whole(config, model, workload, compute).calls().items():
                calls[f"{name} {phase}"] = call
        rounds = phases(calls, repeats, compute.device)
    return {name: {phase: rounds[f"{name} {phase}"] for phase in ("prefill", "decode")} for name in models}
