"""Initial weights of every variant, from the parent's weights (METHOD.md, Initialisation; arXiv 2411.19146, 3.2).

In: a parent block's tensors, and for narrower FFNs the order of its channels. Out: the tensors of a variant's subblock,
named as in a Llama layer: attention has `input_layernorm.weight` and `self_attn.*`, FFN has
`post_attention_layernorm.weight` and `mlp.*`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn

Tensors = dict[str, Tensor]
ATTENTION_PREFIXES = ("input_layernorm.", "self_attn.")
FFN_PREFIXES = ("post_attention_layernorm.", "mlp.")
_ATTENTION_NORM, _FFN_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"


def attention_part(block: Mapping[str, Tensor]) -> Tensors:
    """Select the tensors of a block's attention subblock, its norm included."""
    return {name: tensor for name, tensor in block.items() if name.startswith(ATTENTION_PREFIXES)}


def ffn_part(block: Mapping[str, Tensor]) -> Tensors:
    """Select the tensors of a block's FFN subblock, its norm included."""
    return {name: tensor for name, tensor in block.items() if name.startswith(FFN_PREFIXES)}


def channel_contribution(absolute_sum: Tensor, num_tokens: int, down: Tensor) -> Tensor:
    """Compute the importance of FFN channels: C_i = mean over tokens |x_i| * ||W_down[:, i]||_2.

    Args:
        absolute_sum: sum over tokens of |input of down_proj|, [intermediate].
        num_tokens: tokens in that sum.
        down: weight of down_proj, [hidden, intermediate].

    Returns:
        [intermediate] float64.
    """
    contribution: Tensor = absolute_sum.double() / num_tokens * torch.linalg.vector_norm(down.double(), dim=0)
    return contribution


def channel_order(contribution: Tensor) -> Tensor:
    """Sort channels from the most to the least important, ties by index, [intermediate] int64."""
    return torch.argsort(contribution, descending=True, stable=True)


def kept_channels(order: Tensor, variant: Ffn) -> Tensor:
    """Select the most important channels, as many as a gated FFN variant has, in the parent's order; int64."""
    kept: Tensor = order[: variant.intermediate_size].sort().values
    return kept


def initial_attention(config: ModelConfig, parent: Mapping[str, Tensor], variant: Attention) -> Tensors:
    """Derive the initial tensors of an attention variant.

    For fewer kv heads, k_proj and v_proj are mean-pooled inside each group of kv heads; the norms of queries and keys,
    one for all heads of the parent, stay. The linear variant is W_o W_v
    with the kv heads expanded to query heads: each token attends to itself alone.

    Args:
        config: geometry of the parent.
        parent: tensors of the parent's block.
        variant: gqa with a divisor of the parent's kv heads, linear (which drops the parent's biases), or no_op.
    """
    if variant.kind == "no_op":
        return {}
    if variant.kind == "linear":
        value = parent["self_attn.v_proj.weight"].float().reshape(config.num_kv_heads, 1, config.head_dim, -1)
        seen = value.expand(-1, config.num_heads // config.num_kv_heads, -1, -1).flatten(0, 2)  # a token sees itself
        weight = parent["self_attn.o_proj.weight"]
        mapped = (weight.float() @ seen).to(weight.dtype)
        return {_ATTENTION_NORM: parent[_ATTENTION_NORM], "self_attn.linear_attn.weight": mapped}
    assert variant.kind == "gqa" and config.num_kv_heads % variant.num_kv_heads == 0, variant
    start = attention_part(parent)
    for name in (
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
    ):
        if name in start:
            tensor = start[name]
            groups = tensor.float().reshape(variant.num_kv_heads, -1, config.head_dim, *tensor.shape[1:])
            start[name] = groups.mean(1).reshape(-1, *tensor.shape[1:]).to(tensor.dtype)
    return start


def initial_ffn(parent: Mapping[str, Tensor], variant: Ffn, order: Tensor) -> Tensors:
    """Derive the initial tensors of an FFN variant.

    A narrower FFN keeps the most important channels, in the parent's order. The linear variant is W_down W_up.

    Args:
        parent: tensors of the parent's block.
        variant: gated with at most the parent's width, linear, or no_op.
        order: channels from the most to the least important, from :func:`channel_order`.
    """
    if variant.kind == "no_op":
        return {}
    if variant.kind == "linear":
        down, up = parent["mlp.down_proj.weight"], parent["mlp.up_proj.weight"]
        mapped = (down.float() @ up.float()).to(down.dtype)
        return {_FFN_NORM: parent[_FFN_NORM], "mlp.linear_mlp.weight": mapped}
    assert variant.kind == "gated" and variant.intermediate_size <= len(order), variant
    kept = kept_channels(order, variant)
    start = ffn_part(parent)
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.gate_proj.bias", "mlp.up_proj.bias"):
        if name in start:
            start[name] = start[name][kept]
    start["mlp.down_proj.weight"] = start["mlp.down_proj.weight"][:, kept].contiguous()
    return start
