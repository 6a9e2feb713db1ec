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
from tasks.puzzle.model.blocks import Block, GatedFfn, GroupedQueryAttention
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
    down = _joined(parent, "mlp.down_proj")
    channels = _zeros(down, len(down))
    sums = {
        variant: _Moments(_joined(start, _output(variant)))
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
                sums[attention].add(_attention_features(config, block, hidden), _flat(attended - hidden))
            if len(attentions) < len(starts):
                normed = parent_block.post_attention_layernorm(attended)
                features = parent_block.mlp.channels(normed)
                channels += _gram(_flat(features, config.mlp_bias))
                if Ffn("linear") in sums:
                    sums[Ffn("linear")].add(_flat(normed), _flat(parent_block.mlp.down_proj(features)))
    fitted: dict[Attention | Ffn, Tensors] = {}
    for variant, start in starts.items():
        if variant in sums:
            solution = sums[variant].solve()
        else:
            assert isinstance(variant, Ffn)
            kept = kept_channels(order, variant)
            if config.mlp_bias:  # the constant feature is the last one
                kept = torch.cat([kept, kept.new_tensor([config.intermediate_size])])
            solution = _solve(channels[kept][:, kept], channels[kept] @ down)
        fitted[variant] = _with_layer(start, _output(variant), solution)
    return fitted


def _output(variant: Attention | Ffn) -> str:
    """Return the name of the linear layer that is fitted in a variant."""
    if isinstance(variant, Attention):
        return "self_attn.linear_attn" if variant.kind == "linear" else "self_attn.o_proj"
    return "mlp.linear_mlp" if variant.kind == "linear" else "mlp.down_proj"


def _attention_features(config: ModelConfig, block: Block, hidden: Tensor) -> Tensor:
    """Compute the input of the fitted layer of an attention variant, [sequences x tokens, features]."""
    normed = block.input_layernorm(hidden)
    if isinstance(block.self_attn, GroupedQueryAttention):
        heads = block.self_attn.heads(normed, rotary_for(config, hidden.shape[1], hidden))
        return _flat(heads, config.output_bias)
    return _flat(normed)


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
        return _solve(self._gram, self._cross)


def _joined(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Join weight and bias of a linear layer to one float64 matrix, [inputs (+ 1 for the bias), outputs]."""
    weight = tensors[f"{name}.weight"].double().T
    bias = tensors.get(f"{name}.bias")
    return weight if bias is None else torch.cat([weight, bias.double()[None]])


def _with_layer(start: Tensors, name: str, solution: Tensor) -> Tensors:
    """Copy `start` with one linear layer replaced by `solution`, a matrix in the form of :func:`_joined`."""
    tensors = dict(start)
    weight = tensors[f"{name}.weight"]
    tensors[f"{name}.weight"] = solution[: weight.shape[1]].T.to(weight.dtype).contiguous()
    if f"{name}.bias" in tensors:
        tensors[f"{name}.bias"] = solution[-1].to(weight.dtype)
    return tensors


def _zeros(like: Tensor, columns: int) -> Tensor:
    return like.new_zeros(len(like), columns)


def _flat(hidden: Tensor, with_constant: bool = False) -> Tensor:
    """Flatten [sequences, tokens, n] to float32 [sequences x tokens, n], if asked with a last feature 1 for a bias."""
    flat = hidden.flatten(0, 1).float()
    return torch.nn.functional.pad(flat, (0, 1), value=1.0) if with_constant else flat


def _gram(features: Tensor) -> Tensor:
    return features.T @ features


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    """Solve the ridge regression in float64 over features scaled to unit second moment, [features, targets]."""
    scale = gram.diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt()[:, None]
    normalised = gram / scale / scale.T
    normalised.diagonal().add_(RIDGE)
    return torch.cholesky_solve(cross / scale, torch.linalg.cholesky(normalised)) / scale
