"""The closed-form start of BLD: the output projection that minimises a variant's squared error exactly.

In: a parent block, the initial tensors of its variants, and hidden states at the block's input. Out: the same tensors
with the last matrix (down_proj, o_proj, the only matrix of a linear variant) fitted by ridge regression, so that the
smaller subblock reproduces the parent's output as well as its features allow. Gradient steps then train all matrices.
The loss of BLD (METHOD.md, BLD) is quadratic in that matrix for FFN variants, so the fit is its minimum; for attention
variants it is the minimum of the error before the parent's FFN. METHOD.md proposes the fit for linear variants; fitting
the others is ours.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn
from tasks.puzzle.distill.output_layers import attention_features, flat, joined, output_layer, solve_ridge, with_layer
from tasks.puzzle.model.blocks import Block, GatedFfn
from tasks.puzzle.model.initialise import Tensors, ffn_part, kept_channels
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn

RIDGE = 1e-4
"""The ridge: added to the diagonal of the Gram matrix of features that are scaled to unit second moment."""


def fit_outputs(
    config: ModelConfig,
    parent: Mapping[str, Tensor],
    starts: Mapping[Attention | Ffn, Tensors],
    order: Tensor,
    inputs: Iterable[Tensor],
) -> dict[Attention | Ffn, Tensors]:
    """Fit the output projection of every variant in `starts`.

    Args:
        config: geometry of the parent.
        parent: tensors of the parent's block, in the dtype of compute.
        starts: initial tensors of each variant (its own subblock only): gated or linear FFNs, gqa or linear attention.
        order: the block's channels from the most to the least important; a width keeps the first of them.
        inputs: hidden states at the block's input, [sequences, tokens, hidden] each, read once.

    Returns:
        New tensors of each variant. A variant's bytes do not depend on which others are fitted beside it.
    """
    parent_block = Block.load(config, parent_attention(config), parent_ffn(config), parent)
    assert isinstance(parent_block.mlp, GatedFfn)
    down = joined(parent, "mlp.down_proj")
    channels = _zeros(down, len(down))
    sums = {
        variant: _Moments(joined(start, output_layer(variant)))
        for variant, start in starts.items()
        if variant.kind != "gated"
    }
    attentions = {
        variant: Block.load(config, variant, parent_ffn(config), {**start, **ffn_part(parent)})
        for variant, start in starts.items()
        if isinstance(variant, Attention)
    }
    with torch.inference_mode():
        for hidden in inputs:
            rotary = rotary_for(config, hidden.shape[1], hidden)
            attended = parent_block.attend(hidden, rotary)
            for attention, block in attentions.items():
                with_constant = attention.kind == "gqa" and config.output_bias
                features = flat(attention_features(block, hidden, rotary), with_constant)
                sums[attention].add(features, flat(attended - hidden))
            if len(attentions) < len(starts):
                normed = parent_block.post_attention_layernorm(attended)
                features = parent_block.mlp.channels(normed)
                channels += _gram(flat(features, config.mlp_bias))
                if Ffn("linear") in sums:
                    sums[Ffn("linear")].add(flat(normed), flat(parent_block.mlp.down_proj(features)))
    fitted: dict[Attention | Ffn, Tensors] = {}
    for variant, start in starts.items():
        if variant in sums:
            solution = sums[variant].solve()
        else:
            assert isinstance(variant, Ffn)
            indices = kept_channels(order, variant)
            if config.mlp_bias:  # the constant feature is the last one
                indices = torch.cat([indices, indices.new_tensor([config.intermediate_size])])
            solution = solve_ridge(channels[indices][:, indices], channels[indices] @ down, RIDGE)
        fitted[variant] = with_layer(start, output_layer(variant), solution)
    return fitted


class _Moments:
    """Sums over tokens for one linear layer: products of its inputs with each other and with its target outputs."""

    def __init__(self, layer: Tensor) -> None:
        self._gram = _zeros(layer, len(layer))
        self._cross = _zeros(layer, layer.shape[1])

    def add(self, features: Tensor, target: Tensor) -> None:
        """Add a batch: `features` [tokens, inputs] and `target` [tokens, outputs]."""
        self._gram += _gram(features)
        self._cross += features.T @ target

    def solve(self) -> Tensor:
        """Solve for the layer, [inputs, outputs] float64."""
        return solve_ridge(self._gram, self._cross, RIDGE)


def _zeros(like: Tensor, columns: int) -> Tensor:
    return like.new_zeros(len(like), columns)


def _gram(features: Tensor) -> Tensor:
    return features.T @ features
