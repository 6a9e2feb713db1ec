"""Targets in params.yaml: what a child must keep. Limits on metrics, pinned blocks, allowed variants, runtimes."""

import unicodedata
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from storage.fields import Best, Section, expecting
from storage.metrics import METRICS, MetricName
from storage.records import ChosenBy, Precision, Runtime
from storage.scenario import ScenarioText
from storage.variants import AttentionKind, FfnKind

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
_CountOrBest = Annotated[Count | Best, expecting("a whole number of at least 1, or best")]
_NOT_IN_A_LINE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, surrogates, and separators of lines and paragraphs."""


class Constraint(Section):
    """One limit that the child must meet, absolute or relative to the parent.

    The metrics and their units are those of storage.metrics. A speed relative to the parent's is relative to the parent
    at its own best batch where the batch is `best`.
    """

    metric: MetricName = Field(description="What is limited.")
    at_most: Positive | None = Field(None, description="Absolute upper limit, in the metric's unit.")
    at_least: Positive | None = Field(None, description="Absolute lower limit, in the metric's unit.")
    at_most_ratio: Positive | None = Field(None, description="Upper limit as a multiple of the parent's value.")
    at_least_ratio: Positive | None = Field(None, description="Lower limit as a multiple of the parent's value.")
    hardware: str | None = Field(None, description="Hardware of a speed limit.")
    engine: str = Field("torch", description="Engine of a speed limit.")
    precision: Precision = Field("bfloat16", description="Precision of weights and KV cache.")
    scenario: ScenarioText | None = Field(None, description="Input/output lengths of a speed limit, in tokens.")
    mix: dict[ScenarioText, Positive] = Field(
        {}, description="In place of `scenario`: several, each with its weight, the share of requests."
    )
    batch: _CountOrBest = Field(1, description="Sequences at once (speed and memory); best: the search chooses.")
    context: Count | None = Field(None, description="Tokens per sequence in the KV cache (memory).")
    tensor_parallel: _CountOrBest = Field(1, description="Devices that share the model; best: the search chooses.")

    @property
    def scenarios(self) -> dict[str, float]:
        """Return scenarios with their shares of requests, which add up to 1; none for most sizes."""
        if self.scenario:
            return {self.scenario: 1.0}
        return {name: weight / sum(self.mix.values()) for name, weight in self.mix.items()}

    @property
    def limit(self) -> float:
        """Return the limit, in the metric's unit or as a multiple of the parent's value."""
        limits = (self.at_most, self.at_least, self.at_most_ratio, self.at_least_ratio)
        return next(limit for limit in limits if limit is not None)

    @property
    def is_lower(self) -> bool:
        """Tell whether the child must have at least so much."""
        return self.at_least is not None or self.at_least_ratio is not None

    @property
    def is_relative(self) -> bool:
        """Tell whether the limit is a multiple of the parent's value."""
        return self.at_most_ratio is not None or self.at_least_ratio is not None

    @property
    def is_open(self) -> bool:
        """Tell whether the search chooses its batch or tensor-parallel degree."""
        return "best" in (self.batch, self.tensor_parallel)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        limits = [self.at_most, self.at_least, self.at_most_ratio, self.at_least_ratio]
        if sum(limit is not None for limit in limits) != 1:
            raise ValueError("a constraint needs exactly one of at_most, at_least, at_most_ratio, at_least_ratio")
        metric = METRICS[self.metric]
        if metric.direction not in ("either", "at_least" if self.is_lower else "at_most"):
            raise ValueError(f"{self.metric} takes {metric.direction} (or its _ratio)")
        if self.scenario and self.mix:
            raise ValueError("a constraint has `scenario` or `mix`, not both")
        if metric.speed and not (self.hardware and self.scenarios):
            raise ValueError(f"{self.metric} needs `hardware` and `scenario` (or `mix`)")
        if metric.needs_context and self.context is None and not self.scenario:
            raise ValueError(f"{self.metric} needs `context`, or a `scenario` that it is the end of")
        if self.mix and not metric.speed:
            raise ValueError(f"{self.metric} has no `mix`")
        if self.is_open and not (self.hardware and self.scenarios):
            raise ValueError("`best` needs `hardware` and `scenario` (or `mix`), where it is looked up")
        return self


class Pin(Section):
    """Parent blocks of which the child keeps a part as it is."""

    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, description="Indices of parent blocks.")
    keep: Literal["attention", "ffn", "block"] = Field("block", description="What stays the parent's.")


class Allowed(Section):
    """Kinds of variants that the child may have, besides the parent's own."""

    attention: tuple[AttentionKind, ...] = Field(get_args(AttentionKind), description="Kinds of attention variants.")
    ffn: tuple[FfnKind, ...] = Field(get_args(FfnKind), description="Kinds of FFN variants.")
    spans: bool = Field(True, description="Whether one child block may stand for several of the parent's.")


class Target(Section):
    """The requirements of a child."""

    label: str = Field(min_length=1, max_length=80, description="The name that people see, e.g. 51B-like; one line.")
    constraints: dict[str, Constraint] = Field(min_length=1, description="The limits, by name.")
    chosen_by: ChosenBy = Field(
        "search",
        description="What chooses the child's blocks: the search, or a baseline, which the later stages then heal as "
        "they heal any child; to compare them at equal limits and tokens, give a second target the same constraints.",
    )
    pins: tuple[Pin, ...] = Field((), description="Blocks that keep what they are.")
    allowed: Allowed = Field(
        default_factory=Allowed.model_construct, description="Kinds of variants that may be chosen."
    )
    runtimes: tuple[Runtime, ...] = Field((), description="Runtimes that must load the child and compute it right.")

    @field_validator("label")
    @classmethod
    def _is_a_line(cls, label: str) -> str:
        if not label.strip() or any(unicodedata.category(character) in _NOT_IN_A_LINE for character in label):
            raise ValueError("expected a line of text, without control characters")
        return label
