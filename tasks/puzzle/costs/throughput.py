"""Tokens per second of parent and child: predictions of the cost table, and a GPU's modelled best. No torch.

In: cost rows, the blocks of an architecture, a data sheet. Out: speeds.
"""

from collections.abc import Iterable, Sequence

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.records import CostRow, Precision
from storage.scenario import Scenario, Setting
from storage.variants import Replacement
from tasks.puzzle.costs.cost_table import GIB, CostTable, ModelSpeed, model_speed
from tasks.puzzle.costs.engine_model import TENSORRT_LLM, Engine, Estimate, Model, Platform, best_estimate
from tasks.puzzle.costs.hardware import Device


def predict(costs: Iterable[CostRow], blocks: Sequence[Replacement], setting: Setting) -> ModelSpeed | None:
    """Predict the speed of a model by the measured rows of a cost table; None where they lack one of its components."""
    try:
        return model_speed(CostTable(row for row in costs if row.origin == "measured"), blocks, setting)
    except InputError:
        return None


def best_modelled(
    config: ModelConfig,
    blocks: Sequence[Replacement],
    device: Device,
    precision: Precision,
    scenario: str,
    engine: Engine = TENSORRT_LLM,
) -> tuple[Estimate, str]:
    """Model the speed of an engine at the batch and number of devices with the most tokens/s per device.

    Args:
        config: the parent.
        blocks: the blocks of the parent or a child.
        device: the data sheet.
        precision: the precision of weights and KV cache.
        scenario: input/output tokens.
        engine: the engine.

    Returns:
        The estimate, and how it was modelled.

    Raises:
        InputError: not even one sequence fits.
    """
    model = Model(config, tuple((block.attention, block.ffn) for block in blocks))
    platform = Platform(device, engine, precision)
    try:
        best = best_estimate(model, platform, Scenario.parse(scenario))
    except InputError as error:
        raise InputError(f"benchmark_throughput models {scenario} in {precision}: {error}") from None
    how = f"engine model (docs/costs.md), constants fitted {engine.fitted}; the best batch of {engine.batches_text}"
    return best, f"{how} and number of devices of 1, 2, 4, 8 that fit in {platform.memory_bytes / GIB:.1f} GiB each"
