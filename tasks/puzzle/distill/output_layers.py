"""The last linear layer of a subblock, the one that is fitted in closed form, and what goes into it.

down_proj, o_proj, or the only matrix of a linear variant: the subblock's output is linear in it, so that the best layer
for given inputs is the solution of a least-squares problem. A layer with a bias is one matrix whose last row belongs to
a constant input, [inputs (+ 1), outputs].
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from storage.variants import Attention, Ffn
from tasks.puzzle.model.blocks import Block, GatedFfn, GroupedQueryAttention
from tasks.puzzle.model.initialise import Tensors
from tasks.puzzle.model.rotary import Rotary


def output_layer(variant: Attention | Ffn) -> str:
    """Return the name of the last linear layer of a variant that has one, as within a Llama layer."""
    if isinstance(variant, Attention):
        return "self_attn.linear_attn" if variant.kind == "linear" else "self_attn.o_proj"
    return "mlp.linear_mlp" if variant.kind == "linear" else "mlp.down_proj"


def attention_features(block: Block, hidden: Tensor, rotary: Rotary) -> Tensor:
    """Compute the input of an attention's last layer from the block's input, [sequences, tokens, features]."""
    normed: Tensor = block.input_layernorm(hidden)
    return block.self_attn.heads(normed, rotary) if isinstance(block.self_attn, GroupedQueryAttention) else normed


def ffn_features(block: Block, attended: Tensor) -> Tensor:
    """Compute the input of an FFN's last layer from the states behind attention, [sequences, tokens, features]."""
    normed: Tensor = block.post_attention_layernorm(attended)
    return block.mlp.channels(normed) if isinstance(block.mlp, GatedFfn) else normed


def flat(hidden: Tensor, with_constant: bool = False) -> Tensor:
    """Flatten [sequences, tokens, n] to float32 [sequences x tokens, n], if asked with a last feature 1 for a bias."""
    wide = hidden.flatten(0, 1).float()
    return torch.nn.functional.pad(wide, (0, 1), value=1.0) if with_constant else wide


def joined(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Join weight and bias of a linear layer to one float64 matrix, [inputs (+ 1 for the bias), outputs]."""
    weight = tensors[f"{name}.weight"].double().T
    bias = tensors.get(f"{name}.bias")
    return weight if bias is None else torch.cat([weight, bias.double()[None]])


def with_layer(tensors: Mapping[str, Tensor], name: str, layer: Tensor) -> Tensors:
    """Copy `tensors` with one linear layer replaced by `layer`, a matrix in the form of :func:`joined`, rounded."""
    copied = dict(tensors)
    weight = tensors[f"{name}.weight"]
    copied[f"{name}.weight"] = layer[: weight.shape[1]].T.to(weight.dtype).contiguous()
    if f"{name}.bias" in tensors:
        copied[f"{name}.bias"] = layer[-1].to(weight.dtype)
    return copied


def solve_ridge(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Solve a ridge regression in float64 over features that are scaled to unit second moment.

    Args:
        gram: products of the features with each other, summed over tokens, [features, features].
        cross: products of the features with the outputs, [features, outputs].
        ridge: what is added to the diagonal of the scaled `gram`, which is 1.

    Returns:
        [features, outputs] float64.
    """
    scale = gram.diagonal().clamp_min(torch.finfo(torch.float32).tiny).double().sqrt()[:, None]
    normalised = gram / scale / scale.T
    normalised.diagonal().add_(ridge)
    return torch.cholesky_solve(cross / scale, torch.linalg.cholesky(normalised)) / scale
