"""Which variants a parent's block has, and how large each is. No torch.

In: the parent's geometry and the FFN ratios of params.yaml. Out: variants in a fixed order (the parent's own first),
and for each its parameters, weight bytes and KV bytes per token. The space is Puzzle's (arXiv 2411.19146, section 2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from storage.model_config import ModelConfig
from storage.records import ANY_VARIANT, Attention, Component, Ffn, Precision, Replacement

BYTES_PER_ELEMENT: dict[Precision, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int4": 0.5}
"""Of weight matrices and of the KV cache. int4 counts no scales: 2 bytes per group of 128 would add 3 %."""

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


def parent_attention(config: ModelConfig) -> Attention:
    """The attention variant that the parent's blocks have."""
    return Attention("gqa", config.num_kv_heads)


def parent_ffn(config: ModelConfig) -> Ffn:
    """The FFN variant that the parent's blocks have."""
    return Ffn("gated", config.intermediate_size)


def parent_blocks(config: ModelConfig) -> tuple[Replacement, ...]:
    """The parent itself as a sequence of replacements."""
    attention, ffn = parent_attention(config), parent_ffn(config)
    return tuple(Replacement(index, 1, attention, ffn) for index in range(config.num_blocks))


def attention_variants(config: ModelConfig, linear: bool) -> tuple[Attention, ...]:
    """Attention variants of a block: the parent's kv heads, their proper divisors (descending), linear if so, no-op."""
    heads = config.num_kv_heads
    divisors = [Attention("gqa", count) for count in range(heads, 0, -1) if heads % count == 0]
    return (*divisors, *([Attention("linear")] if linear else []), Attention("no_op"))


def ffn_variants(config: ModelConfig, ratios: Sequence[float], width_multiple: int, linear: bool) -> tuple[Ffn, ...]:
    """FFN variants of a block: the parent's width, narrower ones (descending), one linear layer if asked for, no-op.

    Args:
        config: the parent.
        ratios: widths relative to the parent's.
        width_multiple: widths are rounded to the nearest multiple (halves up), at least one multiple. Equal ones are
            one variant; one that reaches the parent's width is left out.
        linear: whether one linear layer is among them.
    """
    parent = config.intermediate_size
    multiples = (max(1, math.floor(ratio * parent / width_multiple + 0.5)) for ratio in ratios)
    widths = {multiple * width_multiple for multiple in multiples}
    narrower = sorted((width for width in widths if width < parent), reverse=True)
    gated = [Ffn("gated", width) for width in (parent, *narrower)]
    return (*gated, *([Ffn("linear")] if linear else []), Ffn("no_op"))


def attention_elements(config: ModelConfig, attention: Attention) -> Elements:
    """Elements of an attention variant with its norm; a no-op has neither, a linear one is one H x H matrix."""
    if attention.kind == "no_op":
        return Elements()
    hidden = config.hidden_size
    if attention.kind == "linear":
        return Elements(matrix=hidden * hidden, sensitive=hidden)
    query, key_value = config.num_heads * config.head_dim, attention.num_kv_heads * config.head_dim
    biases = (query + 2 * key_value) * config.qkv_bias + hidden * config.output_bias
    return Elements(
        matrix=2 * hidden * query + 2 * hidden * key_value,
        sensitive=hidden + biases,
        kv_per_token=2 * key_value,
    )


def ffn_elements(config: ModelConfig, ffn: Ffn) -> Elements:
    """Elements of an FFN variant with its norm; a no-op has neither, a linear one is one H x H matrix."""
    if ffn.kind == "no_op":
        return Elements()
    hidden = config.hidden_size
    if ffn.kind == "linear":
        return Elements(matrix=hidden * hidden, sensitive=hidden)
    width = ffn.intermediate_size
    return Elements(matrix=3 * hidden * width, sensitive=hidden + (2 * width + hidden) * config.mlp_bias)


def embedding_elements(config: ModelConfig) -> Elements:
    """Elements of the token embedding."""
    return Elements(sensitive=config.vocab_size * config.hidden_size)


def head_elements(config: ModelConfig) -> Elements:
    """Elements of the final norm and the head's own matrix.

    A tied head has no matrix of its own (it is counted once, as the embedding); it is read at every decode step all
    the same, which is time, not size.
    """
    own = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return Elements(sensitive=config.hidden_size + own)


def component_elements(config: ModelConfig, component: Component, variant: str) -> Elements:
    """Elements of a component by the names that cost tables use.

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
    """Parameters and bytes of a component by the names that cost tables use.

    Args:
        config: the parent.
        component: attention, ffn, embedding, head (with the final norm) or step (which has no size).
        variant: `kv_3`, `ffn_1536`, `linear`, `no_op`; ANY_VARIANT for the other components.
        precision: of weight matrices and KV cache; embedding, head, norms and biases stay at 16 bit or more.
    """
    elements = component_elements(config, component, variant)
    each = BYTES_PER_ELEMENT[precision]
    sensitive_bytes = elements.sensitive * max(each, _FEWEST_BYTES_PER_SENSITIVE_ELEMENT)
    return Sizes(
        params=elements.matrix + elements.sensitive,
        weight_bytes=math.ceil(elements.matrix * each + sensitive_bytes),
        kv_bytes_per_token=math.ceil(elements.kv_per_token * each),
    )
