"""What a child takes: parameters, bytes, milliseconds and tokens per second, summed over cost rows. No torch.

In: cost rows (modelled: cost_model.py; timed; or a table that the user brings) and the blocks of an architecture.
Out: sizes and speeds of whole models (quantities.py: what each replacement adds to them). Costs are additive: a child's
cost is the sum over its rows exactly, which makes the search a linear program (arXiv 2411.19146, section 3.3).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.records import (
    ANY_VARIANT,
    Component,
    CostRow,
    Origin,
    Precision,
    Replacement,
    ThroughputRow,
    TimingRow,
)
from tasks.puzzle.variants import Sizes, component_sizes

GIB = 2**30
FIXED_COMPONENTS: tuple[Component, ...] = ("embedding", "head", "step")
"""What every child has as the parent has it."""


@dataclass(frozen=True, order=True)
class Setting:
    """Where milliseconds hold: a column set of the cost table. `scenario` is input/output length in tokens."""

    hardware: str
    engine: str
    precision: Precision
    tensor_parallel: int
    scenario: str
    batch: int

    @classmethod
    def of(cls, row: CostRow | ThroughputRow) -> "Setting":
        """The setting of a row."""
        return cls(row.hardware, row.engine, row.precision, row.tensor_parallel, row.scenario, row.batch)

    @property
    def input_tokens(self) -> int:
        """Tokens that a request reads."""
        return int(self.scenario.split("/")[0])

    @property
    def output_tokens(self) -> int:
        """Tokens that a request generates."""
        return int(self.scenario.split("/")[1])

    @property
    def mean_context(self) -> float:
        """Tokens in the KV cache at a decode step, averaged over a request."""
        return self.input_tokens + self.output_tokens / 2

    @property
    def text(self) -> str:
        """For messages."""
        parallel = f", {self.tensor_parallel} devices" if self.tensor_parallel > 1 else ""
        return f"{self.hardware}, {self.engine}, {self.precision}, {self.scenario}, batch {self.batch}{parallel}"


def from_table(rows: Iterable[CostRow], config: ModelConfig) -> tuple[CostRow, ...]:
    """Cost rows of a table: timings of ours, or costs that a user brings, whose bytes are the user's own.

    Raises:
        InputError: the components have other sizes than `config`'s, so the table is another parent's.
    """
    return tuple(_from_timing(row, config) if isinstance(row, TimingRow) else _own(row, config) for row in rows)


def _own(row: CostRow, config: ModelConfig) -> CostRow:
    sizes = component_sizes(config, row.component, row.variant, row.precision)
    if row.params != sizes.params:
        raise InputError(
            f"the costs of {row.hardware} are another parent's: {row.component} {row.variant} has {row.params:,} "
            f"params there and {sizes.params:,} in this parent; correct the table, or take it out of "
            "measure_costs.timings"
        )
    return row


def _from_timing(row: TimingRow, config: ModelConfig) -> CostRow:
    sizes = component_sizes(config, row.component, row.variant, row.precision)
    timed = Sizes(row.params, row.weight_bytes, row.kv_bytes_per_token)
    if timed != sizes:
        raise InputError(
            f"the timings of {row.hardware} are another parent's: {row.component} {row.variant} has {timed} "
            f"there and {sizes} in this parent; run `python -m flows.measure_costs --time {row.hardware}`"
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
            self._rows[Setting.of(row), row.component, row.variant, row.first_block, row.span] = row
            self._sized[row.component, row.variant].append(row)

    def row(
        self, setting: Setting, component: Component, variant: str, first_block: int | None = None, span: int = 1
    ) -> CostRow:
        """The row of a component: the block's own where there is one, else the one for every block, else span 1's.

        Raises:
            InputError: there is none; the message says what the table has instead.
        """
        for place in ((first_block, span), (None, span), (None, 1)):
            if found := self._rows.get((setting, component, variant, *place)):
                return found
        raise self._missing(setting, component, variant)

    def sizes(
        self,
        component: Component,
        variant: str,
        precision: Precision | None = None,
        hardware: str | None = None,
        engine: str | None = None,
    ) -> Sizes:
        """Parameters and bytes of a component; None leaves a column open.

        Raises:
            InputError: no such row, or rows that disagree on the size.
        """
        key = (component, variant, precision, hardware, engine)
        if key not in self._sizes:
            self._sizes[key] = self._find_sizes(component, variant, precision, hardware, engine)
        return self._sizes[key]

    def _find_sizes(
        self, component: Component, variant: str, precision: Precision | None, hardware: str | None, engine: str | None
    ) -> Sizes:
        wanted = {"precision": precision, "hardware": hardware, "engine": engine}
        rows = [
            row
            for row in self._sized[component, variant]
            if all(value in (None, getattr(row, name)) for name, value in wanted.items())
        ]
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items() if value is not None) or "any setting"
        if not rows:
            raise InputError(
                f"the cost table has no {component} {variant!r} for {asked} (has: {self._known(component)}); "
                "name one of these precisions in the constraint, or run `dvc repro measure_costs`"
            )
        sizes = {Sizes(row.params, row.weight_bytes, row.kv_bytes_per_token) for row in rows}
        if precision is None:  # bytes mean nothing without a precision; parameters must agree all the same
            sizes = {Sizes(size.params, 0, 0) for size in sizes}
        if len(sizes) > 1:
            raise InputError(
                f"the cost table has {len(sizes)} different sizes of {component} {variant!r} for {asked}: {sizes}; "
                "correct it, or name hardware and engine in the constraint"
            )
        return sizes.pop()

    @property
    def settings(self) -> list[Setting]:
        """All settings that have a row, sorted."""
        return sorted({key[0] for key in self._rows})

    def origin(self, setting: Setting) -> Origin:
        """Whether the milliseconds of a setting are measured; a mixture counts as modelled."""
        origins = {row.origin for key, row in self._rows.items() if key[0] == setting}
        return "measured" if origins == {"measured"} else "modelled"

    def _known(self, component: Component) -> str:
        names = sorted(
            {
                f"{row.variant} in {row.precision}"
                for rows in self._sized.values()
                for row in rows
                if row.component == component
            }
        )
        return ", ".join(names) or f"no {component} at all"

    def _missing(self, setting: Setting, component: Component, variant: str) -> InputError:
        here = sorted({key[2] for key in self._rows if key[0] == setting and key[1] == component})
        if here:
            has = f"for these the table has {component}: {', '.join(here)}"
        else:
            has = "the table has " + ("; ".join(known.text for known in self.settings) or "no rows")
        return InputError(
            f"no cost of {component} {variant!r} on {setting.text}; {has}. Run `dvc repro measure_costs`, or time it "
            f"with `python -m flows.measure_costs --time {setting.hardware}`"
        )


@dataclass(frozen=True)
class ModelSizes:
    """Size of a whole model: parameters (all, and those of blocks), bytes of weights, KV bytes per token of context."""

    params: int
    block_params: int
    weight_bytes: int
    kv_bytes_per_token: int

    def memory_gib(self, batch: int, context: int, tensor_parallel: int = 1) -> float:
        """GiB per device of weights and KV cache for `batch` sequences of `context` tokens."""
        return (self.weight_bytes + batch * context * self.kv_bytes_per_token) / tensor_parallel / GIB


@dataclass(frozen=True)
class ModelSpeed:
    """Speed of a whole model in a setting; milliseconds are of the whole batch, decode's of one step."""

    setting: Setting
    prefill_ms: float
    decode_ms: float

    @property
    def latency_ms(self) -> float:
        """Milliseconds of a batch of requests: the input is read, then each output token takes a step."""
        return self.prefill_ms + self.setting.output_tokens * self.decode_ms

    @property
    def prefill_throughput(self) -> float:
        """Tokens/s that are read."""
        return _per_second(self.setting.batch * self.setting.input_tokens, self.prefill_ms)

    @property
    def throughput(self) -> float:
        """Generated tokens/s of whole requests."""
        return _per_second(self.setting.batch * self.setting.output_tokens, self.latency_ms)

    @property
    def decode_throughput(self) -> float:
        """Generated tokens/s while decoding."""
        return _per_second(self.setting.batch, self.decode_ms)


def _per_second(tokens: int, milliseconds: float) -> float:
    return 1e3 * tokens / milliseconds if milliseconds else math.inf


def model_sizes(
    table: CostTable,
    blocks: Sequence[Replacement],
    precision: Precision | None = None,
    hardware: str | None = None,
    engine: str | None = None,
) -> ModelSizes:
    """Sizes of the model with these blocks: the sum over its rows; without `precision` only parameters count."""
    of_blocks = [
        table.sizes(component, variant, precision, hardware, engine)
        for block in blocks
        for component, variant in subblocks(block)
    ]
    fixed = [table.sizes(component, ANY_VARIANT, precision, hardware, engine) for component in FIXED_COMPONENTS]
    everything = of_blocks + fixed
    return ModelSizes(
        params=sum(size.params for size in everything),
        block_params=sum(size.params for size in of_blocks),
        weight_bytes=sum(size.weight_bytes for size in everything),
        kv_bytes_per_token=sum(size.kv_bytes_per_token for size in everything),
    )


def model_speed(table: CostTable, blocks: Sequence[Replacement], setting: Setting) -> ModelSpeed:
    """Speed of the model with these blocks: the sum over its rows."""
    rows = [
        table.row(setting, component, variant, block.first_block, block.span)
        for block in blocks
        for component, variant in subblocks(block)
    ]
    rows += [table.row(setting, component, ANY_VARIANT) for component in FIXED_COMPONENTS]
    return ModelSpeed(setting, math.fsum(row.prefill_ms for row in rows), math.fsum(row.decode_ms for row in rows))


def subblocks(block: Replacement) -> tuple[tuple[Component, str], tuple[Component, str]]:
    """The components of a child block, with their variants."""
    return ("attention", block.attention.name), ("ffn", block.ffn.name)
