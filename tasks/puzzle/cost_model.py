"""The cost model of a GPU: cost rows of every component from a data sheet, without the GPU. No torch.

In: the parent's geometry, the variants, a data sheet and a setting. Out: cost rows with origin "modelled". This is the
simplest honest form, a roofline (Williams et al., CACM 52(4), 2009): a component takes the longer of computing and
moving bytes. It is a lower bound of the time, not a prediction of an engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from storage.model_config import ModelConfig
from storage.records import ANY_VARIANT, Attention, Component, CostRow, Ffn, Precision
from tasks.puzzle.costs import FIXED_COMPONENTS, Setting
from tasks.puzzle.hardware import Device
from tasks.puzzle.variants import component_elements, component_sizes

ENGINE = "roofline"
"""Engine of the rows: an ideal one that reaches the data sheet's peaks."""

_HOW = (
    "roofline: per component max(FLOPs / peak, bytes of weights and KV / bandwidth); "
    "no activations, kernel launches or links"
)


def modelled_rows(
    config: ModelConfig,
    attentions: Sequence[Attention],
    ffns: Sequence[Ffn],
    device: Device,
    precision: Precision,
    scenario: str,
    batch: int,
) -> tuple[CostRow, ...]:
    """Rows of all components on one device.

    Args:
        config: the parent.
        attentions: attention variants to cost.
        ffns: FFN variants to cost.
        device: the data sheet.
        precision: of weights and KV cache; it decides the peak rate as well.
        scenario: input/output tokens.
        batch: sequences at once.
    """
    names: list[tuple[Component, str]] = [("attention", attention.name) for attention in attentions]
    names += [("ffn", ffn.name) for ffn in ffns]
    names += [(component, ANY_VARIANT) for component in FIXED_COMPONENTS]
    setting = Setting(device.name, ENGINE, precision, 1, scenario, batch)
    return tuple(_modelled_row(config, component, variant, device, setting) for component, variant in names)


def _modelled_row(config: ModelConfig, component: Component, variant: str, device: Device, setting: Setting) -> CostRow:
    sizes = component_sizes(config, component, variant, setting.precision)
    inputs, context = setting.input_tokens, setting.mean_context
    prefill = _Pass(setting.batch, new_tokens=inputs, attended_tokens=inputs / 2, cached_tokens=inputs)
    decode = _Pass(setting.batch, new_tokens=1, attended_tokens=context, cached_tokens=context)
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
        prefill_ms=_milliseconds(config, component, variant, device, setting.precision, prefill),
        decode_ms=_milliseconds(config, component, variant, device, setting.precision, decode),
        weight_bytes=sizes.weight_bytes,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        params=sizes.params,
        origin="modelled",
        how=_HOW,
    )


@dataclass(frozen=True)
class _Pass:
    """One pass over the batch, per sequence: new tokens, how many each attends to on average (half of the input under
    a causal mask), and how many go to (prefill) or come from (decode) the KV cache."""

    batch: int
    new_tokens: int
    attended_tokens: float
    cached_tokens: float


def _milliseconds(
    config: ModelConfig, component: Component, variant: str, device: Device, precision: Precision, work: _Pass
) -> float:
    flops, moved_bytes = _work(config, component, variant, precision, work)
    return 1e3 * max(flops / device.peak_flops[precision], moved_bytes / device.memory_bandwidth)


def _work(
    config: ModelConfig, component: Component, variant: str, precision: Precision, work: _Pass
) -> tuple[float, float]:
    """Floating-point operations of a component in a pass, and bytes of weights and KV cache read or written."""
    sizes = component_sizes(config, component, variant, precision)
    tokens = work.batch * work.new_tokens
    if component == "step":
        return 0.0, 0.0
    if component == "embedding":  # a lookup
        return 0.0, tokens * sizes.weight_bytes / config.vocab_size
    if component == "head":  # only the last position of each sequence; a tied matrix is read all the same
        matrix = component_sizes(config, "embedding", ANY_VARIANT, precision)
        return 2.0 * matrix.params * work.batch, matrix.weight_bytes
    elements = component_elements(config, component, variant)
    flops = 2.0 * elements.matrix * tokens
    if elements.kv_per_token:  # q k^T and the weighted sum of v: 2 FLOPs per element each
        flops += 4.0 * tokens * work.attended_tokens * config.num_heads * config.head_dim
    return flops, sizes.weight_bytes + work.batch * work.cached_tokens * sizes.kv_bytes_per_token


_TOKENS_IN_FLIGHT = 8_192


def workspace_bytes(config: ModelConfig, setting: Setting) -> float:
    """Memory per device beside weights and KV cache: activations of one block for the tokens in flight, and logits.

    Engines read long inputs in chunks: at most 8,192 tokens are in flight at once. The parent's block is the largest
    that a child can have, so this holds for every child. 16-bit activations, float32 logits of each sequence's last
    token; what a device shares with others is divided by their number.
    """
    tokens = min(setting.batch * setting.input_tokens, _TOKENS_IN_FLIGHT)
    projected = max(2 * (config.num_heads + config.num_kv_heads) * config.head_dim, 2 * config.intermediate_size)
    activations = tokens * (2 * config.hidden_size + projected / setting.tensor_parallel) * 2
    return activations + setting.batch * config.vocab_size * 4 / setting.tensor_parallel
