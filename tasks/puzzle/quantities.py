"""A metric of a child at its operating point: what a constraint limits, as a sum over the cost table's rows. No torch.

Every metric is linear in a sum over components, or (the throughputs) a constant divided by one, which is what lets the
search limit it. :func:`measure` takes the same metric of a whole child from the table, without the search's
coefficients.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storage.records import ANY_VARIANT, Component, Metric, Precision, Replacement
from tasks.puzzle.costs import (
    FIXED_COMPONENTS,
    GIB,
    CostTable,
    Setting,
    model_sizes,
    model_speed,
    subblocks,
)

_INVERSE: tuple[Metric, ...] = ("throughput", "decode_throughput")
_PARAMS: tuple[Metric, ...] = ("params", "block_params")


@dataclass(frozen=True)
class Quantity:
    """A metric at its operating point.

    Units: params, block_params and attention_blocks count; weight_bytes bytes; kv_bytes bytes/token; memory_gib GiB per
    device at (batch, context), `workspace_bytes` per device included; throughput and decode_throughput tokens/s;
    latency_ms of a whole request, time_to_first_token_ms, time_per_token_ms. `mix` says where a speed is taken and the
    share of requests there. Sizes may leave hardware and engine open (None). `total` is the sum over components,
    `value` the metric.
    """

    metric: Metric
    precision: Precision = "bfloat16"
    hardware: str | None = None
    engine: str | None = None
    mix: tuple[tuple[Setting, float], ...] = ()
    batch: int = 1
    context: int | None = None
    tensor_parallel: int = 1
    workspace_bytes: float = 0.0

    @property
    def setting(self) -> Setting | None:
        """Where milliseconds are looked up (the first place of a mix); None for sizes."""
        return self.mix[0][0] if self.mix else None

    @property
    def scale(self) -> float:
        """`value(total)` is total * scale, or scale / total for the throughputs."""
        if self.inverse:
            return 1e3 * math.fsum(share * setting.output_tokens for setting, share in self.mix)
        return 1 / GIB / self.tensor_parallel if self.metric == "memory_gib" else 1.0

    @property
    def inverse(self) -> bool:
        """Whether more is better, so that the sum over components (milliseconds) divides."""
        return self.metric in _INVERSE

    def value(self, total: float) -> float:
        """The metric, in its unit, of a sum over components."""
        if self.inverse:
            return self.scale / total if total else math.inf
        return total * self.scale

    def total_at(self, value: float) -> float:
        """Inverse of :meth:`value`: the sum over components at which the metric has this value."""
        return self.scale / value if self.inverse else value / self.scale

    def of_blocks(self, table: CostTable, blocks: Iterable[Replacement]) -> tuple[float, ...]:
        """What each replacement adds to the sum."""
        if self.metric == "attention_blocks":
            return tuple(float(block.attention.kind == "gqa") for block in blocks)

        @functools.cache
        def part(component: Component, variant: str, first_block: int, span: int) -> float:
            return self._part(table, component, variant, first_block, span)

        return tuple(
            math.fsum(part(*subblock, block.first_block, block.span) for subblock in subblocks(block))
            for block in blocks
        )

    def fixed(self, table: CostTable) -> float:
        """What embedding, head and step add to the sum, and the workspace."""
        if self.metric in ("block_params", "attention_blocks"):
            return 0.0
        parts = [self._part(table, component, ANY_VARIANT, None, 1) for component in FIXED_COMPONENTS]
        workspace = self.workspace_bytes * self.tensor_parallel if self.metric == "memory_gib" else 0.0
        return math.fsum([*parts, workspace])

    def _part(self, table: CostTable, component: Component, variant: str, first_block: int | None, span: int) -> float:
        if self.mix:
            return math.fsum(
                share * self._milliseconds(table, setting, component, variant, first_block, span)
                for setting, share in self.mix
            )
        precision = None if self.metric in _PARAMS else self.precision
        sizes = table.sizes(component, variant, precision, self.hardware, self.engine)
        if self.metric in _PARAMS:
            return sizes.params
        cached_tokens = {"weight_bytes": 0, "kv_bytes": 1}.get(self.metric, self.batch * (self.context or 0))
        held = 0 if self.metric == "kv_bytes" else sizes.weight_bytes
        return held + cached_tokens * sizes.kv_bytes_per_token

    def _milliseconds(
        self, table: CostTable, at: Setting, component: Component, variant: str, first_block: int | None, span: int
    ) -> float:
        """Milliseconds of a request (its share of the batch for throughputs), or of one of its phases."""
        row = table.row(at, component, variant, first_block, span)
        match self.metric:
            case "throughput":
                return (row.prefill_ms + at.output_tokens * row.decode_ms) / at.batch
            case "decode_throughput":
                return at.output_tokens * row.decode_ms / at.batch
            case "latency_ms":
                return row.prefill_ms + at.output_tokens * row.decode_ms
            case "time_to_first_token_ms":
                return row.prefill_ms
            case _:
                return row.decode_ms


def measure(table: CostTable, blocks: Sequence[Replacement], quantity: Quantity) -> float:
    """The metric of a child in its unit, from the table's rows and not from the search's coefficients."""
    if quantity.mix:
        return _speed(table, blocks, quantity)
    if quantity.metric == "attention_blocks":
        return sum(block.attention.kind == "gqa" for block in blocks)
    precision = None if quantity.metric in _PARAMS else quantity.precision
    sizes = model_sizes(table, blocks, precision, quantity.hardware, quantity.engine)
    if quantity.metric == "memory_gib":
        assert quantity.context is not None, quantity
        held = sizes.memory_gib(quantity.batch, quantity.context, quantity.tensor_parallel)
        return held + quantity.workspace_bytes / GIB
    return {
        "params": sizes.params,
        "block_params": sizes.block_params,
        "weight_bytes": sizes.weight_bytes,
        "kv_bytes": sizes.kv_bytes_per_token,
    }[quantity.metric]


def _speed(table: CostTable, blocks: Sequence[Replacement], quantity: Quantity) -> float:
    """Of requests mixed by their shares: tokens and seconds are added up before they are divided."""
    speeds = [(model_speed(table, blocks, setting), share) for setting, share in quantity.mix]
    if quantity.inverse:
        decoding = quantity.metric == "decode_throughput"
        tokens = math.fsum(share * one.setting.output_tokens for one, share in speeds)
        seconds = math.fsum(
            share * one.setting.output_tokens / (one.decode_throughput if decoding else one.throughput)
            for one, share in speeds
        )
        return tokens / seconds if seconds else math.inf
    return math.fsum(
        share
        * {
            "latency_ms": one.latency_ms,
            "time_to_first_token_ms": one.prefill_ms,
            "time_per_token_ms": one.decode_ms,
        }[quantity.metric]
        for one, share in speeds
    )
