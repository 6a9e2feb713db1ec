"""evaluation.json, the measured quality, sizes and speeds of a target's child beside its parent. No torch.

evaluate_child writes it; the report and the table at the end of the demo read it. Qualities are measured on held-out
text of each domain, speeds by benchmark_throughput; `predicted` numbers are those of the cost table and of the
replace-1-block scores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, Literal, Self

from storage.architecture import ReachedLimit
from storage.documents import TRAINING_MIX
from storage.files import damaged, write_sealed
from storage.json_records import read_record
from storage.metrics import METRICS, Metric
from storage.paths import Paths
from storage.records import Origin, Phase, Precision

ChildState = Literal["assembled", "refined", "distilled"]
"""A target's child as assembled, after its correction (refine_child), after GKD (distill_child)."""
CHILD_STATES: tuple[ChildState, ...] = ("assembled", "refined", "distilled")
ModelName = Literal["parent"] | ChildState


@dataclass(frozen=True)
class Quality:
    """Quality of a model on held-out sequences, means over them.

    Attributes:
        kl: KL(parent || model) of the next-token distribution, nats/token.
        kl_stderr: standard error of `kl`, clustered by document; None where the sequences come from fewer than two.
        perplexity: perplexity on the text.
        top1_agreement: share of tokens on which model and parent rank the same token first.
    """

    kl: float
    kl_stderr: float | None
    perplexity: float
    top1_agreement: float


@dataclass(frozen=True)
class BaselineQuality(Quality):
    """Quality of a baseline, without GKD, on the first `sequences` of the held-out sequences, of so many documents."""

    sequences: int
    documents: int


@dataclass(frozen=True)
class ExportQuality(Quality):
    """Quality of an exported file in llama.cpp; `kl` is to the child in torch, whose perplexity is beside it."""

    torch_perplexity: float


@dataclass(frozen=True)
class PairedDifference:
    """KL of one model minus KL of another on the same sequences, nats/token: mean, and error as in :class:`Quality`."""

    kl_difference: float
    stderr: float | None


@dataclass(frozen=True)
class DomainQuality:
    """Quality of every model on the held-out text of one domain.

    Attributes:
        tokens: held-out tokens that parent and children were measured on.
        sequences: the sequences that they are in.
        documents: the documents that those sequences come from.
        parent: quality of the parent.
        assembled: quality of the child as assembled.
        refined: quality of the child after its correction.
        distilled: quality of the child after GKD.
        baselines: qualities by name of the baseline, those that exist under the target's limits.
        paired: KL minus the assembled child's on the same sequences, by model (`refined`, `distilled`, the baselines).
    """

    tokens: int
    sequences: int
    documents: int
    parent: Quality
    assembled: Quality
    refined: Quality
    distilled: Quality
    baselines: Mapping[str, BaselineQuality]
    paired: Mapping[str, PairedDifference]

    @property
    def models(self) -> dict[ModelName, Quality]:
        """Return qualities of parent and child, by name."""
        return {
            "parent": self.parent,
            "assembled": self.assembled,
            "refined": self.refined,
            "distilled": self.distilled,
        }


@dataclass(frozen=True)
class Exports:
    """Quality of the exported files by format, on `tokens` held-out tokens of so many documents (domain `training`)."""

    tokens: int
    documents: int
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
        """Return a limit of architecture.json with its measured value."""
        return cls(**vars(limit), measured=measured)

    @property
    def is_missed(self) -> bool:
        """Tell whether a measured value is on the wrong side of the limit."""
        return self.measured is not None and not self.is_kept_by(self.measured)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of evaluation.json, without the fields that the metric does not have."""
        return {**super().to_json(), "measured": self.measured}


@dataclass(frozen=True)
class Evaluation:
    """The record of evaluation.json, whose keys are the fields.

    Attributes:
        target: key in params.yaml.
        label: the target's name for people.
        domains: qualities by domain, :data:`TRAINING_MIX` the first.
        exports: quality of the exported files.
        predicted: the score that the tables predict of the assembled child.
        constraints: every limit, predicted and measured.
        speed: speeds at the first speed limit that was measured; None without one.
        speeds: the child's speed over the parent's in every setting that was measured.
    """

    target: str
    label: str
    domains: Mapping[str, DomainQuality]
    exports: Exports
    predicted: PredictedScore
    constraints: tuple[MeasuredLimit, ...]
    speed: MeasuredSpeed | None
    speeds: tuple[SpeedRatio, ...]

    @property
    def training(self) -> DomainQuality:
        """Return qualities on held-out text of the training's own domain, which scores predict."""
        return self.domains[TRAINING_MIX]

    def mean(self, model: ModelName) -> Quality:
        """Return the model's quality as one: the mean over domains, each of which counts alike."""
        return mean_quality([domain.models[model] for domain in self.domains.values()])

    @property
    def speed_metric(self) -> Metric | None:
        """Return the metric of the limit that `speed` was measured for; None where none was."""
        limits = (limit for limit in self.constraints if limit.is_speed and limit.measured is not None)
        first = next(limits, None)
        return METRICS[first.metric] if first and self.speed else None

    @property
    def speed_up(self) -> float | None:
        """Return the child's measured speed as a multiple of the parent's, by `speed_metric`; None without one."""
        metric = self.speed_metric
        if metric is None or self.speed is None:
            return None
        return metric.speed_up(self.speed.assembled[metric.name], self.speed.parent[metric.name])


def mean_quality(domains: Sequence[Quality]) -> Quality:
    """Average qualities on domains that share no document; the perplexity is the geometric mean."""
    errors = [quality.kl_stderr for quality in domains if quality.kl_stderr is not None]
    return Quality(
        kl=fmean(quality.kl for quality in domains),
        kl_stderr=math.hypot(*errors) / len(domains) if len(errors) == len(domains) else None,
        perplexity=geometric_mean(quality.perplexity for quality in domains),
        top1_agreement=fmean(quality.top1_agreement for quality in domains),
    )


def read_evaluation(target: str, paths: Paths) -> Evaluation:
    """Read the evaluation.json of a target.

    Raises:
        InputError: it is missing.
        DamagedFileError: it is not what was written, or a field is missing or has the wrong type.
    """
    path, rebuild = paths.evaluation(target), f"dvc repro evaluate_child@{target}"
    evaluation = read_record(path, Evaluation, rebuild)
    if TRAINING_MIX not in evaluation.domains:
        raise damaged(path, f"has no domain {TRAINING_MIX!r}", rebuild)
    return evaluation


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json."""
    limits = [limit.to_json() for limit in evaluation.constraints]
    write_sealed(path, {**asdict(evaluation), "constraints": limits})
