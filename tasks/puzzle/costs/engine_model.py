"""Modelled speed of engines on GPUs: from data sheets and a few constants that were fitted once. No torch.

In: a model's geometry and blocks, a data sheet, an engine's constants. Out: milliseconds of every component in prefill
and in a decode step, memory, and tokens/s at the best batch. A model's time is exactly the sum of its components'.

The time of a component in one pass over the batch is a sum: products of matrices take a smooth maximum of computing and
of reading the weights; prefill's attention computes; KV is written or read; norms, residuals and activations move the
hidden states; kernels start; with several devices the hidden states are summed over them. The LM head and the embedding
are 16 bit.

Two engines. TENSORRT_LLM takes a batch of requests that begin and end together. TENSORRT_LLM_INFLIGHT holds requests at
mixed ages (in-flight batching): in the time of a request's steps each of the others is replaced once, so the same sum,
prefill of the whole batch + output length x step, is its time between requests.
"""

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.records import ANY_VARIANT, Component, Precision
from storage.scenario import Scenario
from storage.variants import Attention, Ffn
from tasks.puzzle.costs.cost_table import GIB
from tasks.puzzle.costs.hardware import Device
from tasks.puzzle.costs.sizes import component_elements, component_sizes

HIDDEN_PASSES = 6
"""How often a subblock's hidden states go through memory beside its products: norm, residual and activations, read and
written."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Batches of the published runs."""
DEGREES = (1, 2, 4, 8)
"""Tensor-parallel degrees that are tried."""


@dataclass(frozen=True)
class Engine:
    """The shares of a data sheet that an engine reaches.

    Attributes:
        name: the engine's name in cost tables.
        compute: share of peak FLOP/s.
        memory: share of the memory's bandwidth.
        sharpness: exponent of the smooth maximum of computing and reading; where both take equally long, a product
            takes 2^(1/sharpness) times as long.
        launch_ms: time that the kernels of a subblock take to start, in each pass.
        reduce_ms: latency of one sum over devices.
        fitted: the measurements that the constants were fitted to.
        tokens_in_flight: long inputs are read in chunks of this many tokens; a chunk's activations are the workspace.
        batches: sequences that it can hold at once, ascending; it takes the most that fit.
        batches_text: `batches` in words.
        fill: share of a device's total memory that weights, KV cache and workspace may take; None: the memory that the
            data sheet calls usable.
    """

    name: str
    compute: float
    memory: float
    sharpness: float
    launch_ms: float
    reduce_ms: float
    fitted: str
    tokens_in_flight: int = 2_048
    batches: Sequence[int] = BATCHES
    batches_text: str = "1, 2, 4 ... 512"
    fill: float | None = None


@dataclass(frozen=True)
class Platform:
    """The platform that a model runs on: a device, an engine, and the precision of weights and KV cache."""

    device: Device
    engine: Engine
    precision: Precision

    @property
    def peak_flops(self) -> float:
        """Return the FLOP/s that the device's data sheet has for the precision."""
        return self.device.peak_flops[self.precision]

    @property
    def memory_bytes(self) -> float:
        """Return the bytes of each device that weights, KV cache and workspace may take."""
        return self.device.memory_bytes if self.engine.fill is None else self.engine.fill * self.device.total_bytes


@dataclass(frozen=True)
class Shape:
    """One pass over a batch of sequences.

    Attributes:
        batch: sequences at once.
        new_tokens: tokens of each sequence that the pass computes.
        attended: tokens that each of them attends to on average, half of the input under a causal mask.
        cached: tokens of each sequence that go to the KV cache (prefill) or come from it (decode).
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
    def components(self) -> Counter[tuple[Component, str]]:
        """Count each component in a model."""
        names: list[tuple[Component, str]] = [("embedding", ANY_VARIANT), ("head", ANY_VARIANT)]
        for attention, ffn in self.blocks:
            names += [("attention", attention.name), ("ffn", ffn.name)]
        return Counter(names)


@dataclass(frozen=True)
class Estimate:
    """Modelled speed of a model in one setting: tokens/s of each GPU, milliseconds of the whole batch, GiB of each GPU.

    `breakdown` has the milliseconds of prefill and of a decode step for each kind of component.
    """

    batch: int
    tensor_parallel: int
    tokens_per_s_per_gpu: float
    prefill_ms: float
    step_ms: float
    weights_gib: float
    kv_gib: float
    breakdown: dict[str, tuple[float, float]]


def component_ms(
    config: ModelConfig, component: Component, variant: str, platform: Platform, degree: int, shape: Shape
) -> float:
    """Return the milliseconds of one component in one pass, on each of `degree` devices that share its matrices."""
    device, engine = platform.device, platform.engine
    elements = component_elements(config, component, variant)
    tokens, hidden = shape.batch * shape.new_tokens, config.hidden_size
    bandwidth = 1e-3 * device.memory_bandwidth * engine.memory
    wide = 1e-3 * device.peak_flops["bfloat16"] * engine.compute
    if component == "step":
        return 0.0
    if component == "embedding":
        return 2.0 * tokens * hidden / bandwidth
    if component == "head":  # computed for the last position of each sequence; a tied matrix is read all the same
        matrix = config.vocab_size * hidden / degree
        return _smooth(2.0 * matrix * shape.batch / wide, 2.0 * matrix / bandwidth, engine.sharpness)
    if not elements.matrix:
        return 0.0
    sizes, narrow = component_sizes(config, component, variant, platform.precision), platform.peak_flops
    computing_ms = 2.0 * elements.matrix * tokens / (1e-3 * narrow * engine.compute)
    total_ms = _smooth(computing_ms, sizes.weight_bytes / bandwidth, engine.sharpness) / degree
    if elements.kv_per_token:
        attending = 4.0 * tokens * shape.attended * config.num_heads * config.head_dim
        total_ms += attending / wide / degree if shape.new_tokens > 1 else 0.0
        total_ms += shape.batch * shape.cached * sizes.kv_bytes_per_token / bandwidth / degree
    total_ms += HIDDEN_PASSES * 2.0 * tokens * hidden / bandwidth + engine.launch_ms
    if degree > 1:
        share = 2.0 * (degree - 1) / degree
        total_ms += engine.reduce_ms + share * 2.0 * tokens * hidden / (1e-3 * device.link_bandwidth)
    return total_ms


def _smooth(first: float, second: float, sharpness: float) -> float:
    """Return a maximum without a corner."""
    larger = max(first, second)
    if not larger:
        return 0.0
    return larger * math.pow(math.pow(first / larger, sharpness) + math.pow(second / larger, sharpness), 1 / sharpness)


def estimate(model: Model, platform: Platform, scenario: Scenario, degree: int, batch: int) -> Estimate:
    """Estimate the speed at one batch and tensor-parallel degree, whether it fits into memory or not.

    Args:
        model: geometry and blocks.
        platform: device, engine and precision.
        scenario: input and output tokens of a request.
        degree: devices that share each matrix.
        batch: sequences at once.
    """
    inputs, outputs = scenario.input_tokens, scenario.output_tokens
    prefill = Shape(batch, inputs, inputs / 2, inputs)
    decode = Shape(batch, 1, scenario.mean_context, scenario.mean_context)
    breakdown: dict[str, tuple[float, float]] = {}
    for (component, variant), count in model.components.items():
        filling = count * component_ms(model.config, component, variant, platform, degree, prefill)
        stepping = count * component_ms(model.config, component, variant, platform, degree, decode)
        before = breakdown.get(component, (0.0, 0.0))
        breakdown[component] = before[0] + filling, before[1] + stepping
    prefill_ms = math.fsum(filling for filling, _ in breakdown.values())
    step_ms = math.fsum(stepping for _, stepping in breakdown.values())
    weights, per_token = _bytes(model, platform.precision, degree)
    return Estimate(
        batch=batch,
        tensor_parallel=degree,
        tokens_per_s_per_gpu=1e3 * batch * outputs / (prefill_ms + outputs * step_ms) / degree,
        prefill_ms=prefill_ms,
        step_ms=step_ms,
        weights_gib=weights / GIB,
        kv_gib=batch * scenario.total_tokens * per_token / GIB,
        breakdown=breakdown,
    )


def _bytes(model: Model, precision: Precision, degree: int) -> tuple[float, float]:
    """Count the bytes of weights on each device (the embedding is on all of them), and of KV per token of context."""
    weights = per_token = 0.0
    for (component, variant), count in model.components.items():
        sizes = component_sizes(model.config, component, variant, precision)
        weights += count * sizes.weight_bytes / (1 if component == "embedding" else degree)
        per_token += count * sizes.kv_bytes_per_token / degree
    return weights, per_token


def fits(estimated: Estimate, model: Model, platform: Platform, scenario: Scenario) -> bool:
    """Tell whether weights, the KV cache at the requests' end and the workspace fit into each device.

    In-flight batching too reserves a request's whole length when it begins (TensorRT-LLM's GUARANTEED_NO_EVICT).
    """
    tokens = min(estimated.batch * scenario.input_tokens, platform.engine.tokens_in_flight)
    workspace = workspace_bytes(model.config, tokens, estimated.batch, estimated.tensor_parallel)
    return (estimated.weights_gib + estimated.kv_gib) * GIB + workspace <= platform.memory_bytes


def workspace_bytes(config: ModelConfig, tokens: int, batch: int, degree: int) -> float:
    """Return memory per device beside weights and KV cache: a block's activations for the tokens in flight, and logits.

    The parent's block is the largest that a child can have, so this holds for every child. Activations are 16 bit, the
    logits of each sequence's last token float32; what a device shares with others is divided by their number.
    """
    projected = max(2 * (config.num_heads + config.num_kv_heads) * config.head_dim, 2 * config.intermediate_size)
    return 2.0 * tokens * (2 * config.hidden_size + projected / degree) + 4.0 * batch * config.vocab_size / degree


def best_estimate(
    model: Model,
    platform: Platform,
    scenario: Scenario,
    degrees: Sequence[int] = DEGREES,
    batches: Sequence[int] | None = None,
) -> Estimate:
    """Find the estimate with the most tokens/s per GPU, over all degrees and batches that fit into memory.

    At a degree that is the largest batch that fits: time per sequence falls with every sequence more.

    Args:
        model: geometry and blocks.
        platform: device, engine and precision.
        scenario: input and output tokens of a request.
        degrees: tensor-parallel degrees to try.
        batches: sequences at once to try, ascending; None: all that the engine can hold.

    Raises:
        InputError: none of them fits.
    """
    batches = platform.engine.batches if batches is None else batches
    fitting = []
    for degree in degrees:

        def is_too_large(batch: int, degree: int = degree) -> bool:
            return not fits(estimate(model, platform, scenario, degree, batch), model, platform, scenario)

        if num_fitting := bisect.bisect_left(batches, True, key=is_too_large):
            fitting.append(estimate(model, platform, scenario, degree, batches[num_fitting - 1]))
    if not fitting:
        degree, batch = min(degrees), min(batches)
        smallest = estimate(model, platform, scenario, degree, batch)
        raise InputError(
            f"{smallest.weights_gib:.1f} GiB of weights and {smallest.kv_gib:.1f} GiB of KV cache (batch {batch}) do "
            f"not fit into {degree} x {platform.memory_bytes / GIB:.1f} GiB of {platform.device.name}; take "
            f"more devices (up to {max(DEGREES)}), a narrower precision or a smaller batch"
        )
    return max(fitting, key=lambda estimated: estimated.tokens_per_s_per_gpu)


TENSORRT_LLM = Engine(
    name="tensorrt-llm",
    compute=0.683,
    memory=0.9455,
    sharpness=1.282,
    launch_ms=0.00494,
    reduce_ms=0.0778,
    fitted="to the 11 rows of Llama-3.1-70B in the published table (H100 SXM, FP8), by bench_engine_model",
)
TENSORRT_LLM_INFLIGHT = Engine(
    name="tensorrt-llm-inflight",
    compute=0.585,
    memory=0.894,
    sharpness=TENSORRT_LLM.sharpness,
    launch_ms=TENSORRT_LLM.launch_ms,
    reduce_ms=0.023,
    fitted="to 30 rows of Llama-3.1-8B and 3.3-70B in TensorRT-LLM v1.0's own table (H100, H200, FP8), by "
    "bench_engine_model",
    tokens_in_flight=8_192,
    batches=range(1, 2_049),
    batches_text="1, 2, 3 ... 2048",
    fill=0.965,
)
"""Fitted are `compute`, `memory` and `reduce_ms`: 2.4 % off the fit's rows on average and 7.0 % at most; 2.4 to 3.1 %
and 8.7 % at most where a model or a hardware is left out (docs/costs.md). `sharpness` and `launch_ms` are the static
engine's. Chunk and largest batch are TensorRT-LLM's defaults (max_num_tokens, max_batch_size); `fill` is the share of
an H100 that the static engine's rows needed. Host time per step was tried and fitted to nothing.
"""
ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (TENSORRT_LLM, TENSORRT_LLM_INFLIGHT)}
"""Engines by their names in cost tables."""
