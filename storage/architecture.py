"""architecture.json and baselines.json of a target: the chosen blocks, and what the tables predict of them. No torch.

search_architecture and search_baselines write them; every later stage of the target reads them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from storage.files import write_sealed
from storage.json_records import read_record
from storage.metrics import METRICS
from storage.paths import Paths
from storage.records import ChosenBy, Origin, Precision, Weights
from storage.scenario import Setting
from storage.variants import Architecture, Replacement

_SPEED_FIELDS = ("hardware", "engine", "precision", "tensor_parallel", "scenario", "batch")
_MEMORY_FIELDS = ("batch", "context", "tensor_parallel", "workspace_gib")


def _replacements(value: Any) -> tuple[Replacement, ...]:
    return value if isinstance(value, tuple) else Architecture.from_json(value).blocks


Blocks = Annotated[tuple[Replacement, ...], BeforeValidator(_replacements)]
"""The blocks of a child; in JSON as Architecture.to_json writes them."""


@dataclass(frozen=True)
class ParentIdentity:
    """The parent that a child was searched for: its name and content digest."""

    name: str
    digest: str


@dataclass(frozen=True)
class PredictedSpeed:
    """A child's and the parent's value of a speed metric in a setting, as the cost table has them.

    `origin` says whether the milliseconds behind them were measured. The parent has none where it fits at no batch.
    """

    metric: str
    unit: str
    child: float
    parent: float | None
    hardware: str
    engine: str
    precision: Precision
    tensor_parallel: int
    scenario: str
    batch: int
    origin: Origin

    @property
    def setting(self) -> Setting:
        """Return the setting that the speed holds in."""
        return Setting(self.hardware, self.engine, self.precision, self.tensor_parallel, self.scenario, self.batch)

    @property
    def ratio(self) -> float | None:
        """Return the child's speed as a multiple of the parent's; None where the parent has no speed."""
        return None if self.parent is None else METRICS[self.metric].speed_up(self.child, self.parent)


@dataclass(frozen=True)
class Predicted:
    """The tables' predictions of a child. Ratios are to the parent, sizes are in the unit of the field's name.

    `score` is the sum of replace-1-block scores in nats/token. Memory is per device, at `batch`, `context` and
    `tensor_parallel`. `speed` and `throughput_ratio` are those of the first limit on a speed, None where there is none.
    """

    score: float
    score_stderr: float | None
    params: int
    params_ratio: float
    block_params: int
    block_params_ratio: float
    weight_gib: float
    kv_bytes_per_token: int
    kv_ratio: float
    memory_gib: float
    batch: int
    context: int
    tensor_parallel: int
    precision: Precision
    throughput_ratio: float | None
    speed: PredictedSpeed | None


@dataclass(frozen=True)
class SharedSetting:
    """A setting of a mix of scenarios, with the share of requests there."""

    hardware: str
    engine: str
    precision: Precision
    tensor_parallel: int
    scenario: str
    batch: int
    share: float


@dataclass(frozen=True, kw_only=True)
class ReachedLimit:
    """A limit of the target at its operating point, and the child's predicted value.

    A speed has the setting's fields, memory has batch, context, devices and workspace; those of others are None. `mix`
    is empty unless the limit holds for several scenarios; the setting's fields are then those of the first.
    """

    name: str
    metric: str
    kind: Literal["at_most", "at_least"]
    limit: float
    predicted: float
    relative: bool
    unit: str
    hardware: str | None = None
    engine: str | None = None
    precision: Precision | None = None
    tensor_parallel: int | None = None
    scenario: str | None = None
    batch: int | None = None
    mix: tuple[SharedSetting, ...] = ()
    context: int | None = None
    workspace_gib: float | None = None

    @property
    def is_speed(self) -> bool:
        """Tell whether it limits a speed."""
        return METRICS[self.metric].speed is not None

    @property
    def setting(self) -> Setting:
        """Return the setting in which a limit on a speed holds."""
        assert self.hardware is not None and self.engine is not None and self.precision is not None, self
        assert self.tensor_parallel is not None and self.scenario is not None and self.batch is not None, self
        return Setting(self.hardware, self.engine, self.precision, self.tensor_parallel, self.scenario, self.batch)

    def is_kept_by(self, value: float) -> bool:
        """Tell whether a value in the limit's unit keeps the limit."""
        return value >= self.limit if self.kind == "at_least" else value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return the entry of architecture.json, without the fields that the metric does not have."""
        fields = ["name", "metric", "kind", "limit", "predicted", "relative", "unit"]
        if self.is_speed:
            fields += _SPEED_FIELDS
        elif METRICS[self.metric].needs_context:
            fields += _MEMORY_FIELDS
        entry = {field: getattr(self, field) for field in fields}
        return {**entry, "mix": [asdict(setting) for setting in self.mix]} if self.mix else entry


@dataclass(frozen=True)
class ChosenArchitecture:
    """The child that a search chose: the record of architecture.json, whose keys are the fields.

    Attributes:
        target: key in params.yaml.
        label: the target's name for people.
        parent: the parent that the tables are of.
        blocks: the child's blocks, in order.
        operating_points: the settings that the search chose where constraints leave batch or devices open.
        predicted: sizes, score and speed by the tables.
        constraints: every limit, those of devices' memory last.
        chosen_by: `search`, or the baseline that chose the blocks.
    """

    target: str
    label: str
    parent: ParentIdentity
    blocks: Blocks
    operating_points: tuple[Setting, ...]
    predicted: Predicted
    constraints: tuple[ReachedLimit, ...]
    chosen_by: ChosenBy = "search"

    @property
    def architecture(self) -> Architecture:
        """Return the blocks as an architecture."""
        return Architecture(self.blocks)


def read_architecture(target: str, paths: Paths) -> ChosenArchitecture:
    """Read the architecture.json of a target.

    Raises:
        InputError: it is missing.
        DamagedFileError: it is not what was written, or a field is missing or has the wrong type.
    """
    return read_record(paths.architecture(target), ChosenArchitecture, f"dvc repro search_architecture@{target}")


def write_architecture(path: Path, chosen: ChosenArchitecture) -> None:
    """Write architecture.json."""
    fields = {
        "target": chosen.target,
        "label": chosen.label,
        "chosen_by": chosen.chosen_by,
        "parent": asdict(chosen.parent),
        "blocks": chosen.architecture.to_json(),
        "operating_points": [asdict(setting) for setting in chosen.operating_points],
        "predicted": asdict(chosen.predicted),
        "constraints": [limit.to_json() for limit in chosen.constraints],
    }
    write_sealed(path, fields)


@dataclass(frozen=True)
class Baseline:
    """The choice of a simpler search: blocks with their predictions, or why no child of its kind keeps the limits."""

    weights: Weights
    infeasible: str | None = None
    blocks: Blocks | None = None
    predicted: Predicted | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry of baselines.json."""
        if self.blocks is None or self.predicted is None:
            return {"weights": self.weights, "infeasible": self.infeasible}
        return {
            "weights": self.weights,
            "blocks": Architecture(self.blocks).to_json(),
            "predicted": asdict(self.predicted),
        }


@dataclass(frozen=True)
class Baselines:
    """The record of baselines.json: the baselines of a target by name."""

    target: str
    baselines: Mapping[str, Baseline]


def read_baselines(target: str, paths: Paths) -> Mapping[str, Baseline]:
    """Read the baselines of a target, by name.

    Raises:
        InputError: baselines.json is missing.
        DamagedFileError: it is not what was written, or a field is missing or has the wrong type.
    """
    return read_record(paths.baselines(target), Baselines, f"dvc repro search_baselines@{target}").baselines


def write_baselines(path: Path, record: Baselines) -> None:
    """Write baselines.json."""
    entries = {name: baseline.to_json() for name, baseline in record.baselines.items()}
    write_sealed(path, {"target": record.target, "baselines": entries})
