"""A metric of a child at its operating point: what a constraint limits, as a sum over the cost table's rows. No torch.

In: a row of storage.metrics, where it holds, the cost table. Out: what each replacement adds to the sum behind it, and
(:func:`measure`) the metric of a whole child from the table, without the search's coefficients.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storage.metrics import MEMORY, BlockCount, Metric, SizeParts, SpeedParts
from storage.records import ANY_VARIANT, Component, Precision
from storage.scenario import Setting
from storage.variants import Replacement
from tasks.puzzle.costs.cost_table import (
    FIXED_COMPONENTS,
    GIB,
    CostTable,
    model_sizes,
    model_speed,
    subblocks,
)


@dataclass(frozen=True)
class Quantity:
    """A metric at its operating point, in the metric's unit.

    Attributes:
        metric: the metric.
        precision: the precision of weights and KV cache.
        hardware: the hardware whose rows of the cost table give a size; None leaves it open.
        engine: the engine of those rows; None leaves it open.
        mix: settings where a speed is taken, with the share of requests in each; empty for a size.
        batch: sequences at once; for memory.
        context: tokens per sequence in the KV cache; for memory.
        tensor_parallel: devices that share the model; for memory.
        workspace_bytes: bytes that each device needs beside weights and KV cache; for memory.
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
        """Return the setting where milliseconds are looked up (the first of a mix); None for sizes."""
        return self.mix[0][0] if self.mix else None

    @property
    def inverse(self) -> bool:
        """Tell whether more is better, so that the sum over components (milliseconds) divides."""
        return self.metric.more_is_better

    @property
    def scale(self) -> float:
        """Return the factor from a sum to the metric: total * scale, or scale / total for the throughputs."""
        if self.inverse:
            return 1e3 * math.fsum(share * setting.output_tokens for setting, share in self.mix)
        parts = self.metric.parts
        return parts.value(1.0, self.tensor_parallel) if isinstance(parts, SizeParts) else 1.0

    @property
    def cached_tokens(self) -> int:
        """Count the tokens that the KV cache holds, of all sequences of the batch."""
        return self.batch * (self.context or 0)

    def total_at(self, value: float) -> float:
        """Return the sum over components at which the metric has this value, in its unit."""
        return self.scale / value if self.inverse else value / self.scale

    def parts_of_blocks(self, table: CostTable, blocks: Iterable[Replacement]) -> tuple[float, ...]:
        """Return the summands of the replacements, in their order."""
        parts = self.metric.parts
        if isinstance(parts, BlockCount):
            return tuple(float(parts.count([block.attention.kind])) for block in blocks)

        @functools.cache
        def part(component: Component, variant: str, first_block: int, span: int) -> float:
            return self._part(table, component, variant, first_block, span)

        summands = []
        for block in blocks:
            parts_of_block = [part(*subblock, block.first_block, block.span) for subblock in subblocks(block)]
            summands.append(math.fsum(parts_of_block))
        return tuple(summands)

    def fixed_part(self, table: CostTable) -> float:
        """Return the summand that every child has: embedding, head, step, workspace."""
        parts = self.metric.parts
        if isinstance(parts, BlockCount) or (isinstance(parts, SizeParts) and parts.blocks_only):
            return 0.0
        fixed = [self._part(table, component, ANY_VARIANT, None, 1) for component in FIXED_COMPONENTS]
        workspace = self.workspace_bytes * self.tensor_parallel if self.metric.needs_context else 0.0
        return math.fsum([*fixed, workspace])

    def _part(self, table: CostTable, component: Component, variant: str, first_block: int | None, span: int) -> float:
        """Return the summand of a component: milliseconds, mixed by the shares of requests, or a size."""
        parts = self.metric.parts
        if isinstance(parts, SizeParts):
            precision = self.precision if parts.depends_on_precision else None
            sizes = table.sizes(component, variant, precision, self.hardware, self.engine)
            return parts.total(sizes.params, sizes.weight_bytes, sizes.kv_bytes_per_token, self.cached_tokens)
        assert isinstance(parts, SpeedParts), self
        summands = []
        for setting, share in self.mix:
            row = table.row(setting, component, variant, first_block, span)
            milliseconds = parts.milliseconds(row.prefill_ms, row.decode_ms, setting.output_tokens)
            if parts.per_second:  # requests of a batch share its time
                milliseconds /= setting.batch
            summands.append(share * milliseconds)
        return math.fsum(summands)


def memory_in(setting: Setting, workspace_bytes: float = 0.0) -> Quantity:
    """Return the memory of each device in a setting, at the end of its requests."""
    return Quantity(
        MEMORY,
        setting.precision,
        setting.hardware,
        setting.engine,
        batch=setting.batch,
        context=setting.lengths.total_tokens,
        tensor_parallel=setting.tensor_parallel,
        workspace_bytes=workspace_bytes,
    )


def measure(table: CostTable, blocks: Sequence[Replacement], quantity: Quantity) -> float:
    """Compute the metric of a child in its unit, from the table's rows and not from the search's coefficients."""
    parts = quantity.metric.parts
    if isinstance(parts, BlockCount):
        return parts.count(block.attention.kind for block in blocks)
    if isinstance(parts, SpeedParts):
        return _speed(table, blocks, quantity, parts)
    precision = quantity.precision if parts.depends_on_precision else None
    sizes = model_sizes(table, blocks, precision, quantity.hardware, quantity.engine)
    value = sizes.value(parts, quantity.cached_tokens, quantity.tensor_parallel)
    return value + quantity.workspace_bytes / GIB if quantity.metric.needs_context else value


def _speed(table: CostTable, blocks: Sequence[Replacement], quantity: Quantity, parts: SpeedParts) -> float:
    """Compute a speed of requests mixed by their shares: tokens and seconds are added up before they are divided."""
    values = []
    for setting, share in quantity.mix:
        speed = model_speed(table, blocks, setting)
        values.append((speed.value(parts), share, setting.output_tokens))
    if not parts.per_second:
        return math.fsum(share * milliseconds for milliseconds, share, _ in values)
    tokens = math.fsum(share * output_tokens for _, share, output_tokens in values)
    seconds = math.fsum(share * output_tokens / tokens_per_s for tokens_per_s, share, output_tokens in values)
    return tokens / seconds if seconds else math.inf
