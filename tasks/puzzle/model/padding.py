"""A child without linear layers as a plain Llama (Qwen3) of equal blocks: the same numbers, no faster than the parent.

For tools that load no other model. In: a block's tensors. Out: its tensors in the shapes that all blocks have.
Narrow FFNs get zero channels, shared kv heads are repeated, removed subblocks become ones of zero weights, and where
some projections of attentions have biases the others get zero ones. Tensors are named as within a Llama layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from storage.model_config import ModelConfig, expected_shapes
from storage.variants import Attention, Ffn

Blocks = Sequence[tuple[Attention, Ffn]]


def padded_config(config: ModelConfig) -> ModelConfig:
    """Return the geometry as a Llama, or with qk-norm a Qwen3, whose attentions have all four biases or none."""
    bias = config.output_bias or config.qkv_bias
    architecture = "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    return replace(config, architecture=architecture, output_bias=bias, qkv_bias=bias)


def padded_variants(blocks: Blocks) -> tuple[Attention, Ffn]:
    """Choose the variants of every padded block: kv heads that those of all blocks divide, and the widest FFN."""
    heads = math.lcm(*(attention.num_kv_heads for attention, _ in blocks if attention.kind == "gqa"), 1)
    return Attention("gqa", heads), Ffn("gated", max((ffn.intermediate_size for _, ffn in blocks), default=0) or 1)


def padded_block(
    config: ModelConfig,
    block: tuple[Attention, Ffn],
    padded: tuple[Attention, Ffn],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Make the tensors of a padded block, which computes the same as the block.

    Args:
        config: geometry of the child.
        block: variants of the block.
        padded: variants of the padded block (:func:`padded_variants`).
        tensors: tensors of the block, [rows, columns] or [rows].
        dtype: dtype of the tensors that the block lacks.
    """
    attention, _ = block
    repeats = padded[0].num_kv_heads // attention.num_kv_heads if attention.kind == "gqa" else 1
    shapes = expected_shapes(padded_config(config), [padded])
    grown = {}
    for name, shape in shapes.items():
        if not name.startswith("model.layers.0."):
            continue
        short = name.removeprefix("model.layers.0.")
        if short not in tensors:
            grown[short] = torch.ones(shape, dtype=dtype) if "norm" in short else torch.zeros(shape, dtype=dtype)
            continue
        tensor = tensors[short]
        if short.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            heads = tensor.view(attention.num_kv_heads, config.head_dim, *tensor.shape[1:])
            tensor = heads.repeat_interleave(repeats, dim=0).reshape(-1, *tensor.shape[1:])
        grown[short] = _with_zeros(tensor, shape)
    return grown


def _with_zeros(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor with zero rows and columns at the end, up to `shape`."""
    if tensor.shape == shape:
        return tensor
    grown = tensor.new_zeros(shape)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown
