"""Costs of a child: parameters, bytes, milliseconds and tokens per second, summed over cost rows. No torch.

In: cost rows (modelled: cost_model.py; timed; or a table that the user brings) and the blocks of an architecture.
Out: sizes and speeds of whole models (tasks/puzzle/search/quantities.py has the part of each replacement). Costs are
additive: a child's cost is exactly the sum over its rows, which makes the search a linear program (arXiv 2411.19146,
section 3.3).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storage.files import InputError
from storage.metrics import MEMORY, METRICS, MetricName, SizeParts, SpeedParts
from storage.model_config import ModelConfig
from storage.records import ANY_VARIANT, Component, CostRow, Origin, Precision, TimingRow
from storage.scenario import Setting
from storage.variants import Replacement
from tasks.puzzle.costs.sizes import Sizes, component_sizes

GIB = 2**30
FIXED_COMPONENTS: tuple[Component, ...] = ("embedding", "head", "step")
"""Components that every child has in the same form as the parent."""


def from_table(rows: Iterable[CostRow], config: ModelConfig) -> tuple[CostRow, ...]:
    """Make cost rows of a table: our timings, or costs that a user brings, whose bytes may be of another layout.

    Raises:
        InputError: the components have other sizes than `config`'s, so the table is another parent's.
    """
    return tuple(_from_timing(row, config) if isinstance(row, TimingRow) else _from_user(row, config) for row in rows)


def _from_user(row: CostRow, config: ModelConfig) -> CostRow:
    sizes = component_sizes(config, row.component, row.variant, row.precision)
    if row.params != sizes.params:
        raise InputError(
            f"the costs of {row.hardware} are another parent's: {row.component} {row.variant} has {row.params:,} "
            f"params in the table and {sizes.params:,} in this parent; correct the table, or take it out of "
            "measure_costs.timings"
        )
    return row


def _from_timing(row: TimingRow, config: ModelConfig) -> CostRow:
    sizes = component_sizes(config, row.component, row.variant, row.precision)
    timed = Sizes(row.params, row.weight_bytes, row.kv_bytes_per_token)
    if timed != sizes:
        raise InputError(
            f"the timings of {row.hardware} are another parent's: {row.component} {row.variant} has {timed} "
            f"in the table and {sizes} in this parent; run `puzzle time-machine {row.hardware}`"
        )
    fields = {name: getattr(row, name) for name in CostRow.__dataclass_fields__ if name != "how"}
    how = (
        f"{row.how}; {row.machine}; {row.versions}; {row.dtype}, {row.threads} threads, "
        f"{row.repeats} repeats, spread {row.spread:.1%}"
    )
    return CostRow(**fields, how=how)


class CostTable:
    """Cost rows, looked up by component and setting."""

    def __init__(self, rows: Iterable[CostRow]) -> None:
        """Index `rows` (validated: storage.tables)."""
        self._rows: dict[tuple[Setting, Component, str, int | None, int], CostRow] = {}
        self._sized: defaultdict[tuple[Component, str], list[CostRow]] = defaultdict(list)
        self._sizes: dict[tuple[str | None, ...], Sizes] = {}
        for row in rows:
            self._rows[Setting.from_row(row), row.component, row.variant, row.first_block, row.span] = row
            self._sized[row.component, row.variant].append(row)

    def row(
        self, setting: Setting, component: Component, variant: str, first_block: int | None = None, span: int = 1
    ) -> CostRow:
        """Find the row of a component: that of this very block, else the row of every block, else the row of span 1.

        Raises:
            InputError: the table has no such row; the message says what it has instead.
        """
        for place in ((first_block, span), (None, span), (None, 1)):
            if row := self._rows.get((setting, component, variant, *place)):
                return row
        raise self._missing(setting, component, variant)

    def sizes(
        self,
        component: Component,
        variant: str,
        precision: Precision | None = None,
        hardware: str | None = None,
        engine: str | None = None,
    ) -> Sizes:
        """Return parameters and bytes of a component; None leaves a column open.

        Raises:
            InputError: the table has no such row, or rows that disagree on the size.
        """
        key = (component, variant, precision, hardware, engine)
        if key not in self._sizes:
            self._sizes[key] = self._find_sizes(component, variant, precision, hardware, engine)
        return self._sizes[key]

    def _find_sizes(
        self, component: Component, variant: str, precision: Precision | None, hardware: str | None, engine: str | None
    ) -> Sizes:
        columns = {"precision": precision, "hardware": hardware, "engine": engine}
        required = {name: value for name, value in columns.items() if value is not None}
        rows = [
            row
            for row in self._sized[component, variant]
            if all(getattr(row, name) == value for name, value in required.items())
        ]
        setting = ", ".join(f"{name} {value}" for name, value in required.items()) or "any setting"
        if not rows:
            raise InputError(
                f"the cost table has no {component} {variant!r} for {setting} (has: {self._variants_of(component)}); "
                "name one of these precisions in the constraint, or run `dvc repro measure_costs`"
            )
        sizes = {Sizes(row.params, row.weight_bytes, row.kv_bytes_per_token) for row in rows}
        if precision is None:  # bytes mean nothing without a precision; parameters must agree all the same
            sizes = {Sizes(size.params, 0, 0) for size in sizes}
        if len(sizes) > 1:
            raise InputError(
                f"the cost table has {len(sizes)} different sizes of {component} {variant!r} for {setting}: {sizes}; "
                "correct it, or name hardware and engine in the constraint"
            )
        return sizes.pop()

    @property
    def settings(self) -> list[Setting]:
        """List all settings that have a row, sorted."""
        return sorted({key[0] for key in self._rows})

    def origin(self, setting: Setting) -> Origin:
        """Tell whether the milliseconds of a setting are measured; a mixture counts as modelled."""
        origins = {row.origin for key, row in self._rows.items() if key[0] == setting}
        return "measured" if origins == {"measured"} else "modelled"

    def _variants_of(self, component: Component) -> str:
        names = {f"{row.variant} in {row.precision}" for row in self._rows.values() if row.component == component}
        return ", ".join(sorted(names)) or f"no {component} at all"

    def _missing(self, setting: Setting, component: Component, variant: str) -> InputError:
        variants = sorted({key[2] for key in self._rows if key[0] == setting and key[1] == component})
        if variants:
            has = f"in this setting the table has {component}: {', '.join(variants)}"
        else:
            has = "the table has " + ("; ".join(other.text for other in self.settings) or "no rows")
        return InputError(
            f"no cost of {component} {variant!r} on {setting.text}; {has}. Run `dvc repro measure_costs`, or time it "
            f"with `puzzle time-machine {setting.hardware}`"
        )


@dataclass(frozen=True)
class ModelSizes:
    """Size of a whole model: parameters (all, and those of blocks), bytes of weights, KV bytes per token of context."""

    params: int
    block_params: int
    weight_bytes: int
    kv_bytes_per_token: int

    def memory_gib(self, batch: int, context: int, tensor_parallel: int = 1) -> float:
        """Return GiB per device of weights and KV cache for `batch` sequences of `context` tokens."""
        assert isinstance(MEMORY.parts, SizeParts)
        return self.value(MEMORY.parts, batch * context, tensor_parallel)

    def value(self, parts: SizeParts, cached_tokens: int, tensor_parallel: int) -> float:
        """Return a size metric, in its unit."""
        params = self.block_params if parts.blocks_only else self.params
        total = parts.total(params, self.weight_bytes, self.kv_bytes_per_token, cached_tokens)
        return parts.value(total, tensor_parallel)


@dataclass(frozen=True)
class ModelSpeed:
    """Speed of a whole model in a setting: milliseconds of the whole batch, for its input and for one decode step."""

    setting: Setting
    prefill_ms: float
    decode_ms: float

    @property
    def latency_ms(self) -> float:
        """Return the milliseconds of a batch of requests: the input is read, then each output token takes a step."""
        return self._value("latency_ms")

    @property
    def prefill_throughput(self) -> float:
        """Return the input tokens/s that are read."""
        tokens = self.setting.batch * self.setting.input_tokens
        return 1e3 * tokens / self.prefill_ms if self.prefill_ms else math.inf

    @property
    def throughput(self) -> float:
        """Return the generated tokens/s of whole requests."""
        return self._value("throughput")

    @property
    def decode_throughput(self) -> float:
        """Return the generated tokens/s while decoding."""
        return self._value("decode_throughput")

    def value(self, parts: SpeedParts) -> float:
        """Return a speed metric, in its unit."""
        return parts.value(self.prefill_ms, self.decode_ms, self.setting.output_tokens, self.setting.batch)

    def _value(self, metric: MetricName) -> float:
        parts = METRICS[metric].speed
        assert parts is not None, metric
        return self.value(parts)


def model_sizes(
    table: CostTable,
    blocks: Sequence[Replacement],
    precision: Precision | None = None,
    hardware: str | None = None,
    engine: str | None = None,
) -> ModelSizes:
    """Sum the sizes of the model with these blocks over its rows; without `precision` only parameters count."""
    in_blocks = [
        table.sizes(component, variant, precision, hardware, engine)
        for block in blocks
        for component, variant in subblocks(block)
    ]
    fixed = [table.sizes(component, ANY_VARIANT, precision, hardware, engine) for component in FIXED_COMPONENTS]
    everything = in_blocks + fixed
    return ModelSizes(
        params=sum(size.params for size in everything),
        block_params=sum(size.params for size in in_blocks),
        weight_bytes=sum(size.weight_bytes for size in everything),
        kv_bytes_per_token=sum(size.kv_bytes_per_token for size in everything),
    )


def model_speed(table: CostTable, blocks: Sequence[Replacement], setting: Setting) -> ModelSpeed:
    """Return the speed of the model with these blocks, summed over its rows."""
    rows = [
        table.row(setting, component, variant, block.first_block, block.span)
        for block in blocks
        for component, variant in subblocks(block)
    ]
    rows += [table.row(setting, component, ANY_VARIANT) for component in FIXED_COMPONENTS]
    return ModelSpeed(setting, math.fsum(row.prefill_ms for row in rows), math.fsum(row.decode_ms for row in rows))


def subblocks(block: Replacement) -> tuple[tuple[Component, str], tuple[Component, str]]:
    """Return the components of a child block, with their variants."""
    return ("attention", block.attention.name), ("ffn", block.ffn.name)
