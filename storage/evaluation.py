"""evaluation.json, the measured quality, sizes and speeds of a target's child beside its parent. No torch.

evaluate_child writes it; the report and the table at the end of the demo read it. Qualities are measured on held-out
text, speeds by benchmark_throughput; `predicted` numbers are those of the cost table and of the replace-1-block scores.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from storage.architecture import ReachedLimit
from storage.files import write_sealed
from storage.json_records import read_record
from storage.metrics import METRICS, Metric
from storage.paths import Paths
from storage.records import Origin, Phase, Precision


@dataclass(frozen=True)
class Quality:
    """Quality of a model on held-out sequences, means over them.

    Attributes:
        kl: KL(parent || model) of the next-token distribution, nats/token.
        kl_stderr: standard error of `kl` over sequences (the tokens of a sequence are not independent).
        perplexity: perplexity on the text.
        top1_agreement: share of tokens on which model and parent rank the same token first.
    """

    kl: float
    kl_stderr: float
    perplexity: float
    top1_agreement: float


@dataclass(frozen=True)
class BaselineQuality(Quality):
    """Quality of a baseline, before GKD, on the first `sequences` of the held-out sequences."""

    sequences: int


@dataclass(frozen=True)
class ExportQuality(Quality):
    """Quality of an exported file in llama.cpp; `kl` is to the child in torch, whose perplexity is beside it."""

    torch_perplexity: float


@dataclass(frozen=True)
class PairedDifference:
    """KL of one model minus KL of another on the same sequences: mean and its standard error, nats/token."""

    kl_difference: float
    stderr: float


@dataclass(frozen=True)
class Exports:
    """Quality of the exported files by format, on `tokens` held-out tokens."""

    tokens: int
    formats: Mapping[str, ExportQuality]


@dataclass(frozen=True)
class PredictedScore:
    """Sum of the child's replace-1-block scores in nats/token, and its standard error; None where there is none."""

    score: float
    score_stderr: float | None


@dataclass(frozen=True)
class MeasuredSpeed:
    """Speed of parent and assembled child at the first speed limit that this machine could measure.

    Attributes:
        hardware: the limit's hardware, a name of the cost table.
        machine: the machine that was measured, in words.
        is_timed_machine: whether that machine is the limit's hardware.
        engine: the engine of both models.
        precision: the precision of weights and KV cache.
        scenario: input/output tokens.
        batch: sequences at once.
        origin: `measured`.
        parent: medians by name: prefill_ms, decode_ms, and every speed metric in its unit.
        assembled: the child's, like `parent`. GKD changes no speed.
    """

    hardware: str
    machine: str | None
    is_timed_machine: bool
    engine: str
    precision: Precision
    scenario: str
    batch: int
    origin: Origin
    parent: Mapping[str, float]
    assembled: Mapping[str, float]


@dataclass(frozen=True)
class SpeedRatio:
    """Speed of the child over the parent's in one setting.

    Attributes:
        engine: the engine of both models.
        precision: the precision of weights and KV cache.
        scenario: input/output tokens.
        batch: sequences at once.
        phase: prefill or decode.
        measured: ratio of measured tokens/s.
        measured_spread: the larger spread of the two (interquartile range as a share of the median).
        predicted: ratio of the cost table's tokens/s; None where it has none.
        drift: the parent's measured tokens/s over the cost table's; 1 on the machine of the timings.
        read_bytes: a ratio: the bytes that a decode step reads, the parent's over the child's; None for prefill.
    """

    engine: str
    precision: Precision
    scenario: str
    batch: int
    phase: Phase
    measured: float | None
    measured_spread: float
    predicted: float | None
    drift: float | None
    read_bytes: float | None


@dataclass(frozen=True, kw_only=True)
class MeasuredLimit(ReachedLimit):
    """A limit of the target with its predicted and its measured value, in the limit's unit.

    `measured` is the assembled child's; None where it cannot be measured on this machine.
    """

    measured: float | None

    @classmethod
    def from_limit(cls, limit: ReachedLimit, measured: float | None) -> Self:
        """A limit of architecture.json with its measured value."""
        return cls(**vars(limit), measured=measured)

    @property
    def is_missed(self) -> bool:
        """Whether a measured value is on the wrong side of the limit."""
        return self.measured is not None and not self.is_kept_by(self.measured)

    def to_json(self) -> dict[str, Any]:
        """The entry of evaluation.json, without the fields that the metric does not have."""
        return {**super().to_json(), "measured": self.measured}


@dataclass(frozen=True)
class Evaluation:
    """The record of evaluation.json, whose keys are the fields.

    Attributes:
        target: key in params.yaml.
        label: the target's name for people.
        tokens: held-out tokens that params ask for.
        sequences: held-out sequences that parent and children were measured on.
        parent: quality of the parent.
        assembled: quality of the child before GKD.
        distilled: quality of the child after GKD.
        baselines: qualities by name of the baseline, those that exist under the target's limits.
        paired: KL minus the assembled child's on the same sequences, by model (`distilled` and the baselines).
        exports: quality of the exported files.
        predicted: the score that the tables predict of the assembled child.
        constraints: every limit, predicted and measured.
        speed: speeds at the first speed limit that was measured; None without one.
        speeds: the child's speed over the parent's in every setting that was measured.
    """

    target: str
    label: str
    tokens: int
    sequences: int
    parent: Quality
    assembled: Quality
    distilled: Quality
    baselines: Mapping[str, BaselineQuality]
    paired: Mapping[str, PairedDifference]
    exports: Exports
    predicted: PredictedScore
    constraints: tuple[MeasuredLimit, ...]
    speed: MeasuredSpeed | None
    speeds: tuple[SpeedRatio, ...]

    @property
    def speed_metric(self) -> Metric | None:
        """The metric of the limit that `speed` was measured for; None where none was."""
        limits = (limit for limit in self.constraints if limit.is_speed and limit.measured is not None)
        first = next(limits, None)
        return METRICS[first.metric] if first and self.speed else None

    @property
    def speed_up(self) -> float | None:
        """The child's measured speed as a multiple of the parent's, by `speed_metric`; None without one."""
        metric = self.speed_metric
        if metric is None or self.speed is None:
            return None
        return metric.speed_up(self.speed.assembled[metric.name], self.speed.parent[metric.name])


def read_evaluation(target: str, paths: Paths) -> Evaluation:
    """Read the evaluation.json of a target.

    Raises:
        InputError: it is missing.
        DamagedFileError: it is not what was written, or a field is missing or has the wrong type.
    """
    return read_record(paths.evaluation(target), Evaluation, f"dvc repro evaluate_child@{target}")


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json."""
    limits = [limit.to_json() for limit in evaluation.constraints]
    write_sealed(path, {**asdict(evaluation), "constraints": limits})
