"""One target's artifacts as the report shows them: the child, its models with their qualities, and its speed.

In: records of architecture.json, evaluation.json, baselines.json, gkd.json, accuracy.json and throughput.parquet. Out:
the numbers of figures and tables. All of them are the artifacts' or ratios of theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storage.accuracy import Accuracy
from storage.architecture import Baseline, ChosenArchitecture
from storage.evaluation import CHILD_STATES, ChildState, DomainQuality, Evaluation, PairedDifference, Quality
from storage.gkd import GkdCurve
from storage.metrics import METRICS
from storage.records import ThroughputRow
from storage.refinement import Refinement
from storage.scenario import Setting
from storage.variants import Replacement
from tasks.drawing.quality import Series


@dataclass(frozen=True)
class ReportedModel:
    """A model that evaluate_child measured on the text of one domain: the parent, the child or a baseline.

    Attributes:
        name: the model's name for people.
        series: kind of model.
        quality: quality on the domain's held-out text.
        sequences: held-out sequences that it was measured on.
        documents: the documents that those come from.
        paired: KL minus the KL of the assembled child, on the same sequences; None for parent and that child.
        score: predicted KL (sum of replace-1-block scores), nats/token; None where there is none.
        block_params_ratio: parameters in blocks over the parent's.
        kv_ratio: KV cache over the parent's.
        measured_ratio: measured speed over the parent's; None where it was not measured. No baseline is timed.
        predicted_ratio: speed over the parent's by the cost table; None where the target limits no speed.
    """

    name: str
    series: Series
    quality: Quality
    sequences: int
    documents: int
    paired: PairedDifference | None
    score: float | None
    block_params_ratio: float | None
    kv_ratio: float | None
    measured_ratio: float | None
    predicted_ratio: float | None


@dataclass(frozen=True)
class ReportedChild:
    """One target's artifacts; None or empty for those that a run does not have."""

    chosen: ChosenArchitecture
    evaluation: Evaluation | None
    baselines: Mapping[str, Baseline]
    gkd: GkdCurve | None
    throughput: Sequence[ThroughputRow]
    refinement: Refinement | None = None
    accuracy: Accuracy | None = None

    @property
    def target(self) -> str:
        """Return the target's key in params.yaml."""
        return self.chosen.target

    @property
    def label(self) -> str:
        """Return the target's name for people, and the baseline that chose the child where the search did not."""
        chosen = self.chosen
        return chosen.label if chosen.chosen_by == "search" else f"{chosen.label} (chosen by {chosen.chosen_by})"

    @property
    def blocks(self) -> tuple[Replacement, ...]:
        """Return the child's blocks, in order."""
        return self.chosen.blocks

    @property
    def setting(self) -> Setting | None:
        """Return the setting in which the target's first speed limit holds; None if the target limits no speed."""
        speed = self.chosen.predicted.speed
        return speed.setting if speed else None

    @property
    def phase(self) -> str:
        """Return the part of a request whose speed the target limits, in words."""
        limited = self.chosen.predicted.speed
        assert limited is not None, self.target
        speed = METRICS[limited.metric].speed
        assert speed is not None, limited.metric
        return speed.phase

    @property
    def measured_ratio(self) -> float | None:
        """Return the speed over the parent's, measured on the assembled child in the speed limit's setting, or None."""
        measured, limited = self.evaluation.speed if self.evaluation else None, self.chosen.predicted.speed
        if measured is None or limited is None:
            return None
        position = (measured.hardware, measured.engine, measured.scenario, measured.batch)
        if position != (limited.hardware, limited.engine, limited.scenario, limited.batch):
            return None
        child, parent = measured.assembled[limited.metric], measured.parent[limited.metric]
        return METRICS[limited.metric].speed_up(child, parent)

    @property
    def machine(self) -> str:
        """Name the machine that the speed was measured on, with a note where the cost table's timings are another's."""
        assert self.evaluation is not None, self.target
        assert self.evaluation.speed is not None, self.target
        speed = self.evaluation.speed
        note = "" if speed.is_timed_machine else f" (not the machine of the timings {speed.hardware})"
        return f"{speed.machine}{note}"

    @property
    def infeasible_baselines(self) -> list[str]:
        """Return the names of the baselines that found no child within the target's limits."""
        return [_spaced(name) for name, baseline in self.baselines.items() if baseline.infeasible is not None]

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the domains whose text models were measured on, the training's first; none without evaluation.json."""
        return tuple(self.evaluation.domains) if self.evaluation else ()

    def models(self, domain: str) -> list[ReportedModel]:
        """Return every model of the target that was measured on a domain's text, the parent first."""
        measured = self.evaluation.domains.get(domain) if self.evaluation else None
        if measured is None:
            return []
        return [
            self._parent(measured),
            *(self._child(name, measured) for name in CHILD_STATES),
            *(self._baseline(key, measured) for key in measured.baselines),
        ]

    def _parent(self, measured: DomainQuality) -> ReportedModel:
        return ReportedModel(
            name="parent",
            series="parent",
            quality=measured.parent,
            sequences=measured.sequences,
            documents=measured.documents,
            paired=None,
            score=None,
            block_params_ratio=1.0,
            kv_ratio=1.0,
            measured_ratio=None if self.measured_ratio is None else 1.0,
            predicted_ratio=1.0 if self.setting else None,
        )

    def _child(self, name: ChildState, measured: DomainQuality) -> ReportedModel:
        """Return the child in one of its states, which all have the same speed; the scores predict it as assembled."""
        predicted = self.chosen.predicted
        return ReportedModel(
            name=name,
            series=name,
            quality=measured.models[name],
            sequences=measured.sequences,
            documents=measured.documents,
            paired=measured.paired.get(name),
            score=predicted.score if name == "assembled" else None,
            block_params_ratio=predicted.block_params_ratio,
            kv_ratio=predicted.kv_ratio,
            measured_ratio=self.measured_ratio,
            predicted_ratio=predicted.throughput_ratio if self.setting else None,
        )

    def _baseline(self, key: str, measured: DomainQuality) -> ReportedModel:
        baseline, quality = self.baselines.get(key), measured.baselines[key]
        predicted = baseline.predicted if baseline else None
        return ReportedModel(
            name=_spaced(key),
            series="baseline",
            quality=quality,
            sequences=quality.sequences,
            documents=quality.documents,
            paired=measured.paired.get(key),
            score=predicted.score if predicted else None,
            block_params_ratio=predicted.block_params_ratio if predicted else None,
            kv_ratio=predicted.kv_ratio if predicted else None,
            measured_ratio=None,
            predicted_ratio=predicted.throughput_ratio if predicted and self.setting else None,
        )


def _spaced(key: str) -> str:
    return key.replace("_", " ")
