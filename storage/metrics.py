"""The metrics that a target can limit, a row each: unit, direction, and what a model's value is the sum of.

To add a metric, add its row to the table below. Constraints, the form, the search, messages, the report and the closing
table read this table, and the formulas are those of the parts: SpeedParts, SizeParts, BlockCount.

Every metric is linear in a sum over a model's components, or a number of tokens divided by such a sum, which is what
lets the search limit it (arXiv 2411.19146, section 3.3).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, WithJsonSchema

from storage.files import did_you_mean
from storage.variants import AttentionKind

Direction = Literal["at_most", "at_least", "either"]
"""Side of the metric that a target may limit."""

CountedTokens = Literal["none", "one", "all"]
"""Tokens that count: none, one, or all that the operating point has."""


@dataclass(frozen=True)
class SpeedParts:
    """The sum of a speed metric over components: milliseconds of reading the input, and of decode steps.

    Attributes:
        reads_input: whether the milliseconds of reading the input count.
        steps: decode steps that count; `all` is one for each output token.
        per_second: whether the metric is the tokens that a request generates divided by the sum, and not the sum.
    """

    reads_input: bool
    steps: CountedTokens
    per_second: bool = False

    @property
    def phase(self) -> str:
        """Return the part of a request whose time counts, in words."""
        if not self.reads_input:
            return "decode"
        return "prefill" if self.steps == "none" else "whole requests"

    def milliseconds(self, prefill_ms: float, decode_ms: float, output_tokens: int) -> float:
        """Return milliseconds of a whole batch that count, from those of its prefill and of one decode step."""
        steps = {"none": 0, "one": 1, "all": output_tokens}[self.steps]
        return (prefill_ms if self.reads_input else 0.0) + steps * decode_ms

    def value(self, prefill_ms: float, decode_ms: float, output_tokens: int, batch: int) -> float:
        """Return the metric of a model: milliseconds of a whole batch, or the tokens/s that it generates."""
        if not self.per_second:
            return self.milliseconds(prefill_ms, decode_ms, output_tokens)
        tokens = output_tokens if self.reads_input else 1  # of decoding alone: the output length cancels out
        milliseconds = self.milliseconds(prefill_ms, decode_ms, tokens)
        return 1e3 * (batch * tokens) / milliseconds if milliseconds else math.inf


@dataclass(frozen=True)
class SizeParts:
    """The sum of a size metric over components.

    Attributes:
        params: whether parameters count.
        weight_bytes: whether the bytes of weights count.
        cached_tokens: tokens whose bytes of KV cache count; `all` is a batch of sequences of the context's length.
        blocks_only: whether embedding, head and final norm are left out.
        per_device: whether the sum is divided by the number of devices that share the model.
        parts_in_unit: the number of units of a part the metric's unit has.
    """

    params: bool = False
    weight_bytes: bool = False
    cached_tokens: CountedTokens = "none"
    blocks_only: bool = False
    per_device: bool = False
    parts_in_unit: int = 1

    @property
    def depends_on_precision(self) -> bool:
        """Tell whether bytes count."""
        return self.weight_bytes or self.cached_tokens != "none"

    def total(self, params: int, weight_bytes: int, kv_bytes_per_token: int, cached_tokens: int) -> int:
        """Return the sum of what counts, from a component's or model's sizes and the tokens that its KV cache holds."""
        tokens = {"none": 0, "one": 1, "all": cached_tokens}[self.cached_tokens]
        return self.params * params + self.weight_bytes * weight_bytes + tokens * kv_bytes_per_token

    def value(self, total: float, tensor_parallel: int) -> float:
        """Return the metric of a sum."""
        shared = total / tensor_parallel if self.per_device else total
        return shared / self.parts_in_unit if self.parts_in_unit > 1 else shared  # a count stays an integer


@dataclass(frozen=True)
class BlockCount:
    """A metric that counts blocks: those whose attention is of one of the kinds."""

    attention: tuple[AttentionKind, ...]

    def count(self, kinds: Iterable[AttentionKind]) -> int:
        """Return the number of these attention variants that count."""
        return sum(kind in self.attention for kind in kinds)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: the name in params.yaml, tables and files.
        unit: the metric's unit, in words.
        part_unit: the unit of a replacement's summand.
        direction: the side that a target may limit; `either` is up to the target.
        title: the name for people, which begins a sentence.
        description: a phrase for people that says what counts.
        parts: the sum or the count behind the metric.
        relative_in_form: whether the UI's form takes the limit as a multiple of the parent's value.
    """

    name: str
    unit: str
    part_unit: str
    direction: Direction
    title: str
    description: str
    parts: SpeedParts | SizeParts | BlockCount
    relative_in_form: bool = False

    @property
    def speed(self) -> SpeedParts | None:
        """Return the sum of a speed metric; None for sizes and counts."""
        return self.parts if isinstance(self.parts, SpeedParts) else None

    @property
    def needs_context(self) -> bool:
        """Tell whether the metric counts the KV cache of a batch of sequences: memory."""
        return isinstance(self.parts, SizeParts) and self.parts.cached_tokens == "all"

    @property
    def more_is_better(self) -> bool:
        """Tell whether a model with a larger value is the better one: the throughputs."""
        return isinstance(self.parts, SpeedParts) and self.parts.per_second

    def speed_up(self, child: float, parent: float) -> float:
        """Return the child's speed as a multiple of the parent's, from their values of a speed metric."""
        assert self.speed is not None, self.name
        return child / parent if self.more_is_better else parent / child


_ROWS = (
    Metric(
        name="params",
        unit="parameters",
        part_unit="parameters",
        direction="at_most",
        title="Parameters",
        description="parameters of the whole model",
        parts=SizeParts(params=True),
        relative_in_form=True,
    ),
    Metric(
        name="block_params",
        unit="parameters",
        part_unit="parameters",
        direction="at_most",
        title="Block parameters",
        description="parameters in blocks",
        parts=SizeParts(params=True, blocks_only=True),
        relative_in_form=True,
    ),
    Metric(
        name="attention_blocks",
        unit="blocks",
        part_unit="blocks",
        direction="either",
        title="Attention blocks",
        description="blocks that attend through a KV cache",
        parts=BlockCount(("gqa",)),
    ),
    Metric(
        name="weight_bytes",
        unit="bytes",
        part_unit="bytes",
        direction="at_most",
        title="Weights",
        description="bytes of all weights",
        parts=SizeParts(weight_bytes=True),
        relative_in_form=True,
    ),
    Metric(
        name="kv_bytes",
        unit="bytes/token",
        part_unit="bytes/token",
        direction="at_most",
        title="KV cache",
        description="bytes of KV cache for each token of context",
        parts=SizeParts(cached_tokens="one"),
        relative_in_form=True,
    ),
    Metric(
        name="memory_gib",
        unit="GiB",
        part_unit="bytes",
        direction="at_most",
        title="Memory",
        description="weights and KV cache on each device, at a batch and context",
        parts=SizeParts(weight_bytes=True, cached_tokens="all", per_device=True, parts_in_unit=2**30),
    ),
    Metric(
        name="throughput",
        unit="tokens/s",
        part_unit="ms/request",
        direction="at_least",
        title="Throughput",
        description="generated tokens/s of whole requests",
        parts=SpeedParts(reads_input=True, steps="all", per_second=True),
        relative_in_form=True,
    ),
    Metric(
        name="decode_throughput",
        unit="tokens/s",
        part_unit="ms/request",
        direction="at_least",
        title="Decode throughput",
        description="generated tokens/s of decoding alone",
        parts=SpeedParts(reads_input=False, steps="all", per_second=True),
        relative_in_form=True,
    ),
    Metric(
        name="latency_ms",
        unit="ms",
        part_unit="ms",
        direction="at_most",
        title="Latency",
        description="time of a whole request",
        parts=SpeedParts(reads_input=True, steps="all"),
    ),
    Metric(
        name="time_to_first_token_ms",
        unit="ms",
        part_unit="ms",
        direction="at_most",
        title="Time to the first token",
        description="time to read the input",
        parts=SpeedParts(reads_input=True, steps="none"),
    ),
    Metric(
        name="time_per_token_ms",
        unit="ms",
        part_unit="ms",
        direction="at_most",
        title="Time per token",
        description="time of one decode step",
        parts=SpeedParts(reads_input=False, steps="one"),
    ),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ROWS}
"""Every metric by its name."""
MEMORY = METRICS["memory_gib"]
"""Memory of each device, which the search also limits by itself where a device has a data sheet."""


def _checked(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric{did_you_mean(name, METRICS)} (metrics: {', '.join(METRICS)})")
    return name


MetricName = Annotated[str, AfterValidator(_checked), WithJsonSchema({"type": "string", "enum": list(METRICS)})]
"""The name of a metric, as a field of params.yaml or of a form."""
