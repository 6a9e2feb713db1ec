"""Modelled throughput of any checkpoint from its config.json: no weights, no torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage.files import read_json
from storage.model_config import from_config_json
from storage.records import Precision
from tasks.puzzle.engine_model import BATCHES, DEGREES, TENSORRT_LLM, Estimate, Model, best_estimate
from tasks.puzzle.hardware import check_precision, device_named


@dataclass(frozen=True)
class Asked:
    """A setting: the batch and the tensor-parallel degree may be left to the model (None: the best)."""

    hardware: str
    precision: Precision
    scenario: str
    tensor_parallel: int | None
    batch: int | None


def estimate_throughput(config_json: Path, asked: Asked) -> dict[str, Any]:
    """Modelled speed, memory and what they are made of: {hardware, ..., tokens_per_s_per_gpu, ..., breakdown}.

    Raises:
        InputError: the config is of no supported kind, the hardware has no units for the precision, or nothing fits.
    """
    device = device_named(asked.hardware)
    check_precision(device, asked.precision)
    inputs, outputs = map(int, asked.scenario.split("/"))
    found = best_estimate(
        read_model(config_json),
        device,
        TENSORRT_LLM,
        asked.precision,
        (inputs, outputs),
        DEGREES if asked.tensor_parallel is None else (asked.tensor_parallel,),
        BATCHES if asked.batch is None else (asked.batch,),
    )
    told = {**asdict(asked), **_told(found)}
    return told | {"origin": "modelled", "engine": TENSORRT_LLM.name, "fitted": TENSORRT_LLM.fitted}


def read_model(config_json: Path) -> Model:
    """A Llama-like config.json, or one of the nemotron-nas form, whose blocks may all differ."""
    config, blocks = from_config_json(read_json(config_json, "the download"), str(config_json))
    return Model(config, tuple(blocks))


def _told(found: Estimate) -> dict[str, Any]:
    told = asdict(found)
    told["breakdown"] = {
        component: {"prefill_ms": prefill, "step_ms": step} for component, (prefill, step) in found.breakdown.items()
    }
    return told
