"""Modelled throughput of any checkpoint from its config.json: no weights, no torch.

Run: `puzzle estimate --config CONFIG_JSON`. The model is tasks/puzzle/costs/engine_model.py.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.json_files import read_object
from storage.nemotron_nas import from_config_json
from storage.records import Precision
from storage.scenario import Scenario
from storage.sections import ModelledEngine
from tasks.puzzle.costs.engine_model import (
    DEGREES,
    ENGINES,
    Engine,
    Estimate,
    Model,
    Platform,
    best_estimate,
)
from tasks.puzzle.costs.hardware import check_precision, device_named


@dataclass(frozen=True)
class EstimateSetting:
    """The setting that a checkpoint is to run in; where batch or tensor-parallel degree is None, the best is taken."""

    hardware: str
    engine: ModelledEngine
    precision: Precision
    scenario: str
    tensor_parallel: int | None
    batch: int | None


@dataclass(frozen=True)
class ThroughputEstimate:
    """Modelled speed and memory of a checkpoint; `best` has the batch and degree that the setting left open."""

    setting: EstimateSetting
    engine: Engine
    best: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object {hardware, ..., tokens_per_s_per_gpu, ..., breakdown, origin, engine, fitted}."""
        breakdown = {
            component: {"prefill_ms": prefill_ms, "step_ms": step_ms}
            for component, (prefill_ms, step_ms) in self.best.breakdown.items()
        }
        engine = {"origin": "modelled", "fitted": self.engine.fitted}
        return asdict(self.setting) | asdict(self.best) | {"breakdown": breakdown} | engine


def estimate_throughput(config_json: Path, setting: EstimateSetting) -> ThroughputEstimate:
    """Model a checkpoint's speed and memory, with the components' shares.

    Raises:
        InputError: the config is of no supported kind, the hardware has no units for the precision, or nothing fits.
    """
    device, engine = device_named(setting.hardware), ENGINES[setting.engine]
    check_precision(device, setting.precision)
    best = best_estimate(
        read_model(config_json),
        Platform(device, engine, setting.precision),
        Scenario.parse(setting.scenario),
        DEGREES if setting.tensor_parallel is None else (setting.tensor_parallel,),
        None if setting.batch is None else (setting.batch,),
    )
    return ThroughputEstimate(setting, engine, best)


def read_model(config_json: Path) -> Model:
    """Read the model of a Llama-like config.json, or of one in the nemotron-nas form, whose blocks may all differ."""
    config, blocks = from_config_json(read_object(config_json, "the download"), str(config_json))
    return Model(config, tuple(blocks))
