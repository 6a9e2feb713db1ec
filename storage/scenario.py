"""The settings that a speed holds in. A scenario: the tokens that a request reads and generates, such as `128/1024`.

A setting: hardware, engine, precision, devices, scenario and batch; a column set of the cost table.
"""

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import StringConstraints

from storage.fields import expecting
from storage.records import CostRow, Precision, ThroughputRow

ScenarioText = Annotated[
    str,
    StringConstraints(pattern=r"^[1-9][0-9]{0,8}/[1-9][0-9]{0,8}$"),
    expecting("INPUT/OUTPUT lengths in tokens, such as 128/1024"),
]
"""A scenario as params.yaml and tables hold it: input length / output length, in tokens."""


@dataclass(frozen=True, order=True)
class Scenario:
    """Lengths of a request in tokens, at least one each."""

    input_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the scenario that a text of the form `128/1024` names; the text was checked where it came in."""
        input_tokens, output_tokens = map(int, text.split("/"))
        return cls(input_tokens, output_tokens)

    def __str__(self) -> str:
        """Return the text form, such as `128/1024`."""
        return f"{self.input_tokens}/{self.output_tokens}"

    @property
    def mean_context(self) -> float:
        """Return the tokens in the KV cache at a decode step, averaged over a request."""
        return self.input_tokens + self.output_tokens / 2

    @property
    def total_tokens(self) -> int:
        """Return the tokens in the KV cache at the request's end."""
        return self.input_tokens + self.output_tokens

    def scaled(self, factor: float) -> "Scenario":
        """Return both lengths times `factor`, at least a token each."""
        return Scenario(max(1, round(self.input_tokens * factor)), max(1, round(self.output_tokens * factor)))


@dataclass(frozen=True, order=True)
class Place:
    """The hardware and the requests that a model is served with: a setting without batch and tensor-parallel degree."""

    hardware: str
    engine: str
    precision: Precision
    scenario: str


@dataclass(frozen=True, order=True)
class Setting:
    """The setting that milliseconds hold in; `scenario` is input length / output length in tokens."""

    hardware: str
    engine: str
    precision: Precision
    tensor_parallel: int
    scenario: str
    batch: int

    @classmethod
    def from_row(cls, row: CostRow | ThroughputRow) -> Self:
        """Return the setting of a row of costs.parquet or throughput.parquet."""
        return cls(row.hardware, row.engine, row.precision, row.tensor_parallel, row.scenario, row.batch)

    @property
    def place(self) -> Place:
        """Return the setting without batch and tensor-parallel degree."""
        return Place(self.hardware, self.engine, self.precision, self.scenario)

    @property
    def lengths(self) -> Scenario:
        """Return the scenario's lengths."""
        return Scenario.parse(self.scenario)

    @property
    def input_tokens(self) -> int:
        """Return the tokens that a request reads."""
        return self.lengths.input_tokens

    @property
    def output_tokens(self) -> int:
        """Return the tokens that a request generates."""
        return self.lengths.output_tokens

    @property
    def mean_context(self) -> float:
        """Return the tokens in the KV cache at a decode step, averaged over a request."""
        return self.lengths.mean_context

    @property
    def text(self) -> str:
        """Return the setting as text for messages."""
        parallel = f", {self.tensor_parallel} devices" if self.tensor_parallel > 1 else ""
        return f"{self.hardware}, {self.engine}, {self.precision}, {self.scenario}, batch {self.batch}{parallel}"
