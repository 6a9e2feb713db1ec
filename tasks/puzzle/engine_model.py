"""Modelled speed of an engine on GPUs: from data sheets and five constants that were fitted once. No torch.

In: a model's geometry and blocks, a data sheet, an engine's constants. Out: milliseconds of every component in prefill
and in a decode step, memory, and tokens/s at the best batch. A model's time is the sum of its components', exactly.

Of a component, in one pass over the batch: products of matrices take a smooth maximum of computing and of reading the
weights; prefill's attention computes; KV is written or read; norms, residuals and activations move hidden states;
kernels start; with several devices the hidden states are summed over them. The LM head and the embedding are 16 bit.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.records import ANY_VARIANT, Attention, Component, Ffn, Precision
from tasks.puzzle.costs import GIB
from tasks.puzzle.hardware import Device
from tasks.puzzle.variants import component_elements, component_sizes

HIDDEN_PASSES = 6
"""How often a subblock's hidden states go through memory beside its products: norm, residual, activations, each way."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""What the published runs sit on."""
DEGREES = (1, 2, 4, 8)
TOKENS_IN_FLIGHT = 2_048
"""Long inputs are read in chunks of so many tokens; their activations are the workspace."""


@dataclass(frozen=True)
class Engine:
    """What an engine reaches of a data sheet.

    compute, memory: shares of peak FLOP/s and bandwidth. sharpness: exponent of the smooth maximum of both; where they
    take alike, a product takes 2^(1/sharpness) times each. launch_ms: of a subblock's kernels, each pass. reduce_ms:
    latency of one sum over devices. `fitted` says to what.
    """

    name: str
    compute: float
    memory: float
    sharpness: float
    launch_ms: float
    reduce_ms: float
    fitted: str


@dataclass(frozen=True)
class Shape:
    """One pass over a batch, per sequence.

    New tokens, how many each attends to on average (half of the input under a causal mask), and how many go to
    (prefill) or come from (decode) the KV cache.
    """

    batch: int
    new_tokens: int
    attended: float
    cached: float


@dataclass(frozen=True)
class Model:
    """A model to be estimated: geometry and its blocks, which may all differ."""

    config: ModelConfig
    blocks: tuple[tuple[Attention, Ffn], ...]

    @property
    def components(self) -> dict[tuple[Component, str], int]:
        """How often each component occurs."""
        found: dict[tuple[Component, str], int] = {("embedding", ANY_VARIANT): 1, ("head", ANY_VARIANT): 1}
        pairs: itertools.chain[tuple[Component, str]] = itertools.chain.from_iterable(
            (("attention", attention.name), ("ffn", ffn.name)) for attention, ffn in self.blocks
        )
        for component in pairs:
            found[component] = found.get(component, 0) + 1
        return found


@dataclass(frozen=True)
class Estimate:
    """Modelled speed of a model in one setting; tokens/s are of each GPU, milliseconds of the whole batch."""

    batch: int
    tensor_parallel: int
    tokens_per_s_per_gpu: float
    prefill_ms: float
    step_ms: float
    weights_gib: float
    kv_gib: float
    breakdown: dict[str, tuple[float, float]]


def component_ms(
    config: ModelConfig,
    component: Component,
    variant: str,
    device: Device,
    engine: Engine,
    precision: Precision,
    tensor_parallel: int,
    shape: Shape,
) -> float:
    """Milliseconds of one component in one pass."""
    elements = component_elements(config, component, variant)
    tokens, hidden = shape.batch * shape.new_tokens, config.hidden_size
    bandwidth = 1e-3 * device.memory_bandwidth * engine.memory
    wide = 1e-3 * device.peak_flops["bfloat16"] * engine.compute
    if component == "step":
        return 0.0
    if component == "embedding":
        return 2.0 * tokens * hidden / bandwidth
    if component == "head":  # of the last position of each sequence; a tied matrix is read all the same
        matrix = config.vocab_size * hidden / tensor_parallel
        return _smooth(2.0 * matrix * shape.batch / wide, 2.0 * matrix / bandwidth, engine.sharpness)
    if not elements.matrix:
        return 0.0
    sizes, narrow = component_sizes(config, component, variant, precision), device.peak_flops[precision]
    computing = 2.0 * elements.matrix * tokens / (1e-3 * narrow * engine.compute)
    found = _smooth(computing, sizes.weight_bytes / bandwidth, engine.sharpness) / tensor_parallel
    if elements.kv_per_token:
        attending = 4.0 * tokens * shape.attended * config.num_heads * config.head_dim
        found += attending / wide / tensor_parallel if shape.new_tokens > 1 else 0.0
        found += shape.batch * shape.cached * sizes.kv_bytes_per_token / bandwidth / tensor_parallel
    found += HIDDEN_PASSES * 2.0 * tokens * hidden / bandwidth + engine.launch_ms
    if tensor_parallel > 1:
        share = 2.0 * (tensor_parallel - 1) / tensor_parallel
        found += engine.reduce_ms + share * 2.0 * tokens * hidden / (1e-3 * device.link_bandwidth)
    return found


def _smooth(one: float, other: float, sharpness: float) -> float:
    """A maximum without a corner."""
    larger = max(one, other)
    if not larger:
        return 0.0
    return larger * math.pow(math.pow(one / larger, sharpness) + math.pow(other / larger, sharpness), 1 / sharpness)


def estimate(
    model: Model,
    device: Device,
    engine: Engine,
    precision: Precision,
    scenario: tuple[int, int],
    degree: int,
    batch: int,
) -> Estimate:
    """Speed at one batch and tensor-parallel degree, whether it fits or not.

    Args:
        model: geometry and blocks.
        device: the data sheet.
        engine: the constants.
        precision: of weights and KV cache.
        scenario: input and output tokens.
        degree: devices that share each matrix.
        batch: sequences at once.
    """
    inputs, outputs = scenario
    prefill = Shape(batch, inputs, inputs / 2, inputs)
    decode = Shape(batch, 1, inputs + outputs / 2, inputs + outputs / 2)
    breakdown: dict[str, tuple[float, float]] = {}
    for (component, variant), count in model.components.items():
        filling, stepping = (
            count * component_ms(model.config, component, variant, device, engine, precision, degree, shape)
            for shape in (prefill, decode)
        )
        before = breakdown.get(component, (0.0, 0.0))
        breakdown[component] = before[0] + filling, before[1] + stepping
    prefill_ms, step_ms = (math.fsum(times[at] for times in breakdown.values()) for at in (0, 1))
    weights, per_token = _bytes(model, precision, degree)
    return Estimate(
        batch=batch,
        tensor_parallel=degree,
        tokens_per_s_per_gpu=1e3 * batch * outputs / (prefill_ms + outputs * step_ms) / degree,
        prefill_ms=prefill_ms,
        step_ms=step_ms,
        weights_gib=weights / GIB,
        kv_gib=batch * (inputs + outputs) * per_token / GIB,
        breakdown=breakdown,
    )


def _bytes(model: Model, precision: Precision, degree: int) -> tuple[float, float]:
    """Bytes of weights on each device (the embedding is on all of them), and of KV per token of context."""
    weights = per_token = 0.0
    for (component, variant), count in model.components.items():
        sizes = component_sizes(model.config, component, variant, precision)
        weights += count * sizes.weight_bytes / (1 if component == "embedding" else degree)
        per_token += count * sizes.kv_bytes_per_token / degree
    return weights, per_token


def fits(found: Estimate, model: Model, device: Device, scenario: tuple[int, int]) -> bool:
    """Whether weights, the KV cache at the requests' end and the workspace fit into each device."""
    tokens = min(found.batch * scenario[0], TOKENS_IN_FLIGHT)
    workspace = workspace_bytes(model.config, tokens, found.batch, found.tensor_parallel)
    return (found.weights_gib + found.kv_gib) * GIB + workspace <= device.memory_bytes


def workspace_bytes(config: ModelConfig, tokens: int, batch: int, degree: int) -> float:
    """Memory per device beside weights and KV cache: activations of one block for the tokens in flight, and logits.

    The parent's block is the largest that a child can have, so this holds for every child. 16-bit activations, float32
    logits of each sequence's last token; what a device shares with others is divided by their number.
    """
    projected = max(2 * (config.num_heads + config.num_kv_heads) * config.head_dim, 2 * config.intermediate_size)
    return 2.0 * tokens * (2 * config.hidden_size + projected / degree) + 4.0 * batch * config.vocab_size / degree


def best_estimate(
    model: Model,
    device: Device,
    engine: Engine,
    precision: Precision,
    scenario: tuple[int, int],
    degrees: Sequence[int] = DEGREES,
    batches: Sequence[int] = BATCHES,
) -> Estimate:
    """The setting with the most tokens/s per GPU among those that fit.

    Raises:
        InputError: none of them fits.
    """
    found = [
        one
        for degree in degrees
        for batch in batches
        if fits(one := estimate(model, device, engine, precision, scenario, degree, batch), model, device, scenario)
    ]
    if not found:
        least = min(degrees), min(batches)
        one = estimate(model, device, engine, precision, scenario, *least)
        raise InputError(
            f"{one.weights_gib:.1f} GiB of weights and {one.kv_gib:.1f} GiB of KV cache (batch {least[1]}) do not fit "
            f"into {least[0]} x {device.memory_bytes / GIB:.1f} GiB of {device.name}; take more devices (up to "
            f"{max(DEGREES)}), a narrower precision or a smaller batch"
        )
    return max(found, key=lambda one: one.tokens_per_s_per_gpu)


TENSORRT_LLM = Engine(
    name="tensorrt-llm",
    compute=0.683,
    memory=0.9455,
    sharpness=1.282,
    launch_ms=0.00494,
    reduce_ms=0.0778,
    fitted="to the 11 rows of Llama-3.1-70B in the published table (H100 SXM, FP8), by bench_engine_model",
)
