"""The cost model of a GPU: cost rows of every component from a data sheet, without the GPU. No torch.

In: the parent's geometry, the variants, a data sheet and a setting. Out: cost rows with origin "modelled". Engines that
are modelled: an ideal one, the roofline (Williams et al., CACM 52(4), 2009), where a component takes the longer of
computing and moving bytes, a lower bound of the time; and TensorRT-LLM, with static or in-flight batches, by
tasks/puzzle/costs/engine_model.py, a prediction.
"""

from collections.abc import Sequence

from storage.model_config import ModelConfig
from storage.records import ANY_VARIANT, Component, CostRow, Precision
from storage.scenario import Setting
from storage.variants import Attention, Ffn
from tasks.puzzle.costs import engine_model
from tasks.puzzle.costs.cost_table import FIXED_COMPONENTS
from tasks.puzzle.costs.engine_model import ENGINES, Platform, Shape, component_ms
from tasks.puzzle.costs.hardware import Device
from tasks.puzzle.costs.sizes import component_elements, component_sizes

ENGINE = "roofline"
"""Name of the ideal engine, which reaches the data sheet's peaks."""

_HOW = (
    "roofline: per component max(FLOPs / peak, bytes of weights and KV / bandwidth); "
    "no activations, kernel launches or links"
)


def modelled_rows(
    config: ModelConfig,
    attentions: Sequence[Attention],
    ffns: Sequence[Ffn],
    device: Device,
    setting: Setting,
) -> tuple[CostRow, ...]:
    """Return the rows of all components; milliseconds are of each of the setting's devices, sizes of the whole.

    Args:
        config: the parent.
        attentions: attention variants to cost.
        ffns: FFN variants to cost.
        device: the data sheet.
        setting: a setting on that device; its engine is `roofline` (on a single device) or in ENGINES, its
            precision is that of weights and KV cache and decides the peak rate as well.
    """
    assert setting.hardware == device.name
    assert setting.engine in ENGINES or (setting.engine, setting.tensor_parallel) == (ENGINE, 1)
    names: list[tuple[Component, str]] = [("attention", attention.name) for attention in attentions]
    names += [("ffn", ffn.name) for ffn in ffns]
    names += [(component, ANY_VARIANT) for component in FIXED_COMPONENTS]
    return tuple(_modelled_row(config, component, variant, device, setting) for component, variant in names)


def _modelled_row(config: ModelConfig, component: Component, variant: str, device: Device, setting: Setting) -> CostRow:
    sizes = component_sizes(config, component, variant, setting.precision)
    inputs, context = setting.input_tokens, setting.mean_context
    prefill = Shape(setting.batch, new_tokens=inputs, attended=inputs / 2, cached=inputs)
    decode = Shape(setting.batch, new_tokens=1, attended=context, cached=context)
    return CostRow(
        component=component,
        variant=variant,
        first_block=None,
        span=1,
        hardware=setting.hardware,
        engine=setting.engine,
        precision=setting.precision,
        tensor_parallel=setting.tensor_parallel,
        scenario=setting.scenario,
        batch=setting.batch,
        prefill_ms=_milliseconds(config, component, variant, device, setting, prefill),
        decode_ms=_milliseconds(config, component, variant, device, setting, decode),
        weight_bytes=sizes.weight_bytes,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        params=sizes.params,
        origin="modelled",
        how=_HOW if setting.engine == ENGINE else f"engine model, constants fitted {ENGINES[setting.engine].fitted}",
    )


def _milliseconds(
    config: ModelConfig, component: Component, variant: str, device: Device, setting: Setting, shape: Shape
) -> float:
    """Return the milliseconds of a component in one pass, by the model of the setting's engine."""
    if engine := ENGINES.get(setting.engine):
        platform = Platform(device, engine, setting.precision)
        return component_ms(config, component, variant, platform, setting.tensor_parallel, shape)
    flops, moved_bytes = _operations(config, component, variant, setting.precision, shape)
    return 1e3 * max(flops / device.peak_flops[setting.precision], moved_bytes / device.memory_bandwidth)


def _operations(
    config: ModelConfig, component: Component, variant: str, precision: Precision, shape: Shape
) -> tuple[float, float]:
    """Count a component's floating-point operations in a pass, and bytes of weights and KV cache read or written."""
    sizes = component_sizes(config, component, variant, precision)
    tokens = shape.batch * shape.new_tokens
    if component == "step":
        return 0.0, 0.0
    if component == "embedding":  # a lookup
        return 0.0, tokens * sizes.weight_bytes / config.vocab_size
    if component == "head":  # only the last position of each sequence; a tied matrix is read all the same
        matrix = component_sizes(config, "embedding", ANY_VARIANT, precision)
        return 2.0 * matrix.params * shape.batch, matrix.weight_bytes
    elements = component_elements(config, component, variant)
    flops = 2.0 * elements.matrix * tokens
    if elements.kv_per_token:  # q k^T and the weighted sum of v: 2 FLOPs per element each
        flops += 4.0 * tokens * shape.attended * config.num_heads * config.head_dim
    return flops, sizes.weight_bytes + shape.batch * shape.cached * sizes.kv_bytes_per_token


_TOKENS_IN_FLIGHT = 8_192
"""Long inputs are read in chunks of this many tokens, in an engine that is not the engine model's."""


def workspace_bytes(config: ModelConfig, setting: Setting) -> float:
    """Return bytes of each device beside weights and KV cache, in a modelled engine; others get the roofline's."""
    engine = ENGINES.get(setting.engine)
    tokens = min(setting.batch * setting.input_tokens, engine.tokens_in_flight if engine else _TOKENS_IN_FLIGHT)
    return engine_model.workspace_bytes(config, tokens, setting.batch, setting.tensor_parallel)


def usable_bytes(device: Device, setting: Setting) -> float:
    """Return bytes of each device that weights, KV cache and workspace may take in the setting's engine."""
    engine = ENGINES.get(setting.engine)
    return Platform(device, engine, setting.precision).memory_bytes if engine else device.memory_bytes
