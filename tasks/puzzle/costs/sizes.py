"""The size of each component: parameters, weight bytes, KV bytes per token, counted from the parent's geometry.

In: the parent's geometry and a component's name, as cost tables have it. Out: element counts, and sizes in a precision.
"""

import math
from dataclasses import dataclass

from storage.model_config import ModelConfig
from storage.records import ANY_VARIANT, Component, Precision
from storage.variants import Attention, Ffn

BYTES_PER_ELEMENT: dict[Precision, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int4": 0.5}
"""Bytes of an element of weight matrices and of the KV cache. int4 leaves out its scales: 2 bytes for each group of 128
would add 3 %."""

_FEWEST_BYTES_PER_SENSITIVE_ELEMENT = 2
"""Embedding, head, norms and biases stay in 16 bit when matrices go to fp8 or int4, as in the published checkpoints."""


@dataclass(frozen=True)
class Elements:
    """Element counts of a component: `matrix` is quantised with the precision, `sensitive` never below 16 bit.

    `kv_per_token` counts cached elements per token of context.
    """

    matrix: int = 0
    sensitive: int = 0
    kv_per_token: int = 0


@dataclass(frozen=True)
class Sizes:
    """Size of a component: parameters, bytes of its weights, bytes of KV cache per token of context."""

    params: int
    weight_bytes: int
    kv_bytes_per_token: int


def attention_elements(config: ModelConfig, attention: Attention) -> Elements:
    """Count elements of an attention variant with its norm; a no-op has neither, a linear one is one H x H matrix."""
    if attention.kind == "no_op":
        return Elements()
    hidden = config.hidden_size
    if attention.kind == "linear":
        return Elements(matrix=hidden * hidden, sensitive=hidden)
    query, key_value = config.num_heads * config.head_dim, attention.num_kv_heads * config.head_dim
    biases = (query + 2 * key_value) * config.qkv_bias + hidden * config.output_bias
    norms = hidden + 2 * config.head_dim * config.qk_norm
    return Elements(
        matrix=2 * hidden * query + 2 * hidden * key_value,
        sensitive=norms + biases,
        kv_per_token=2 * key_value,
    )


def ffn_elements(config: ModelConfig, ffn: Ffn) -> Elements:
    """Count elements of an FFN variant with its norm; a no-op has neither, a linear one is one H x H matrix."""
    if ffn.kind == "no_op":
        return Elements()
    hidden = config.hidden_size
    if ffn.kind == "linear":
        return Elements(matrix=hidden * hidden, sensitive=hidden)
    width = ffn.intermediate_size
    return Elements(matrix=3 * hidden * width, sensitive=hidden + (2 * width + hidden) * config.mlp_bias)


def embedding_elements(config: ModelConfig) -> Elements:
    """Count the elements of the token embedding."""
    return Elements(sensitive=config.vocab_size * config.hidden_size)


def head_elements(config: ModelConfig) -> Elements:
    """Count the elements of the final norm and the head's own matrix.

    A tied head has no matrix of its own (it is counted once, as the embedding); it is read at every decode step all
    the same, which is time, not size.
    """
    matrix = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return Elements(sensitive=config.hidden_size + matrix)


def component_elements(config: ModelConfig, component: Component, variant: str) -> Elements:
    """Count the elements of a component by the names that cost tables use.

    Raises:
        InputError: `variant` names no attention or FFN variant.
    """
    if component == "attention":
        return attention_elements(config, Attention.parse(variant))
    if component == "ffn":
        return ffn_elements(config, Ffn.parse(variant))
    assert variant == ANY_VARIANT, variant
    if component == "embedding":
        return embedding_elements(config)
    return head_elements(config) if component == "head" else Elements()


def component_sizes(config: ModelConfig, component: Component, variant: str, precision: Precision) -> Sizes:
    """Count the parameters and bytes of a component by the names that cost tables use.

    Args:
        config: the parent.
        component: attention, ffn, embedding, head (with the final norm) or step (which has no size).
        variant: `kv_3`, `ffn_1536`, `linear`, `no_op`; ANY_VARIANT for the other components.
        precision: the precision of weight matrices and KV cache; embedding, head, norms and biases stay at 16 bit or
            more.
    """
    elements = component_elements(config, component, variant)
    bytes_per_element = BYTES_PER_ELEMENT[precision]
    sensitive_bytes = elements.sensitive * max(bytes_per_element, _FEWEST_BYTES_PER_SENSITIVE_ELEMENT)
    return Sizes(
        params=elements.matrix + elements.sensitive,
        weight_bytes=math.ceil(elements.matrix * bytes_per_element + sensitive_bytes),
        kv_bytes_per_token=math.ceil(elements.kv_per_token * bytes_per_element),
    )
