"""Targets in params.yaml: what a child must keep. Limits on metrics, pinned blocks, allowed variants, runtimes."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from storage.fields import Best, Scenario, Section
from storage.records import AttentionKind, FfnKind, Metric, Precision, Runtime

SPEED_METRICS: tuple[Metric, ...] = (
    "throughput",
    "decode_throughput",
    "latency_ms",
    "time_to_first_token_ms",
    "time_per_token_ms",
)
LOWER_LIMITS: tuple[Metric, ...] = ("throughput", "decode_throughput", "attention_blocks")
"""Metrics of which a target asks for at least so much."""

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Constraint(Section):
    """One limit that the child must meet, absolute or relative to the parent.

    Units: params, block_params and attention_blocks count; weight_bytes bytes; kv_bytes bytes per token; memory_gib GiB
    per device at (batch, context); throughput generated tokens/s of whole requests; decode_throughput tokens/s of
    decoding alone; latency_ms of a whole request; time_to_first_token_ms of reading the input; time_per_token_ms of a
    decode step. A speed relative to the parent's is relative to the parent at its own best batch where the batch is
    `best`.
    """

    metric: Metric = Field(description="What is limited.")
    at_most: Positive | None = Field(None, description="Absolute upper limit, in the metric's unit.")
    at_least: Positive | None = Field(None, description="Absolute lower limit, in the metric's unit.")
    at_most_ratio: Positive | None = Field(None, description="Upper limit as a multiple of the parent's value.")
    at_least_ratio: Positive | None = Field(None, description="Lower limit as a multiple of the parent's value.")
    hardware: str | None = Field(None, description="Hardware of a speed limit.")
    engine: str = Field("torch", description="Engine of a speed limit.")
    precision: Precision = Field("bfloat16", description="Precision of weights and KV cache.")
    scenario: Scenario | None = Field(None, description="Input/output lengths of a speed limit, in tokens.")
    mix: dict[Scenario, Positive] = Field(
        {}, description="In place of `scenario`: several, each with its weight, the share of requests."
    )
    batch: Count | Best = Field(1, description="Sequences at once (speed and memory); best: the search chooses.")
    context: Count | None = Field(None, description="Tokens per sequence in the KV cache (memory).")
    tensor_parallel: Count | Best = Field(1, description="Devices that share the model; best: the search chooses.")

    @property
    def scenarios(self) -> dict[str, float]:
        """Scenarios with their shares of requests, which add up to 1; none for most sizes."""
        if self.scenario:
            return {self.scenario: 1.0}
        return {name: weight / sum(self.mix.values()) for name, weight in self.mix.items()}

    @property
    def is_open(self) -> bool:
        """Whether the search chooses its batch or tensor-parallel degree."""
        return "best" in (self.batch, self.tensor_parallel)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        limits = [self.at_most, self.at_least, self.at_most_ratio, self.at_least_ratio]
        if sum(limit is not None for limit in limits) != 1:
            raise ValueError("a constraint needs exactly one of at_most, at_least, at_most_ratio, at_least_ratio")
        lower = self.at_least is not None or self.at_least_ratio is not None
        if lower != (self.metric in LOWER_LIMITS) and self.metric != "attention_blocks":
            raise ValueError(f"{self.metric} takes {'at_least' if not lower else 'at_most'} (or its _ratio)")
        if self.scenario and self.mix:
            raise ValueError("a constraint has `scenario` or `mix`, not both")
        if self.metric in SPEED_METRICS and not (self.hardware and self.scenarios):
            raise ValueError(f"{self.metric} needs `hardware` and `scenario` (or `mix`)")
        if self.metric == "memory_gib" and self.context is None and not self.scenario:
            raise ValueError("memory_gib needs `context`, or a `scenario` that it is the end of")
        if self.metric not in SPEED_METRICS and self.mix:
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
    """What a child must keep."""

    label: str = Field(min_length=1, description="The name that people see, e.g. 51B-like.")
    constraints: dict[str, Constraint] = Field(min_length=1, description="The limits, by name.")
    pins: tuple[Pin, ...] = Field((), description="Blocks that keep what they are.")
    allowed: Allowed = Field(
        default_factory=Allowed.model_construct, description="Kinds of variants that may be chosen."
    )
    runtimes: tuple[Runtime, ...] = Field((), description="Runtimes that must load the child and compute it right.")
