"""The closed-form start of BLD: the output projection that minimises a variant's squared error exactly.

In: a parent block, the initial tensors of its variants, hidden states at the block's input. Out: the same tensors with
the last matrix (down_proj, o_proj) fitted by ridge regression, so that the smaller subblock reproduces the parent's
output as well as its features allow; gradient steps then train everything. The loss of BLD (METHOD.md, BLD) is
quadratic in down_proj, so for FFN variants this is its minimum over that matrix; for attention variants it is the
minimum of the error before the parent's FFN. Ours, not the paper's.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from storage.model_config import ModelConfig
from storage.records import Attention, Ffn
from tasks.puzzle.blocks import Block, GatedFfn, GroupedQueryAttention
from tasks.puzzle.initialise import Tensors, ffn_part, kept_channels
from tasks.puzzle.rotary import rotary_for
from tasks.puzzle.variants import parent_attention, parent_ffn

RIDGE = 1e-4
"""Added to the diagonal of the Gram matrix of features scaled to unit second moment."""


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
        starts: initial tensors of each variant (its own subblock only); FFNs are gated, attention is gqa.
        order: the block's channels from the most to the least important: a width keeps the first ones.
        inputs: hidden states at the block's input, [sequences, tokens, hidden] each, read once.

    Returns:
        New tensors for each variant. A variant's bytes are independent of which others are fitted beside it.
    """
    teacher = Block.load(config, parent_attention(config), parent_ffn(config), parent)
    assert isinstance(teacher.mlp, GatedFfn)
    down = _joined(parent, "mlp.down_proj")
    channels = _zeros(down, len(down))
    heads = {
        variant: _HeadMoments(config, variant, start, parent)
        for variant, start in starts.items()
        if isinstance(variant, Attention)
    }
    with torch.inference_mode():
        for hidden in inputs:
            rotary = rotary_for(config, hidden.shape[1], hidden)
            attended = teacher.attend(hidden, rotary)
            for moments in heads.values():
                moments.add(hidden, attended)
            if len(heads) < len(starts):
                features = teacher.mlp.channels(teacher.post_attention_layernorm(attended))
                channels += _gram(features, config.mlp_bias)
    fitted: dict[Attention | Ffn, Tensors] = {}
    for variant, start in starts.items():
        if isinstance(variant, Attention):
            fitted[variant] = _with(start, "self_attn.o_proj", heads[variant].solve())
        else:
            kept = kept_channels(order, variant)
            if config.mlp_bias:  # the constant feature stands last
                kept = torch.cat([kept, kept.new_tensor([config.intermediate_size])])
            solution = _solve(channels[kept][:, kept], channels[kept] @ down)
            fitted[variant] = _with(start, "mlp.down_proj", solution)
    return fitted


class _HeadMoments:
    """Sums over tokens for one attention variant: its heads' outputs x themselves and x the parent's attention."""

    def __init__(self, config: ModelConfig, variant: Attention, start: Tensors, parent: Mapping[str, Tensor]) -> None:
        self._config = config
        self._block = Block.load(config, variant, parent_ffn(config), {**start, **ffn_part(parent)})
        output = _joined(start, "self_attn.o_proj")
        self._gram = _zeros(output, len(output))
        self._cross = _zeros(output, output.shape[1])

    def add(self, hidden: Tensor, attended: Tensor) -> None:
        """Add a batch: the block's input and the parent's hidden states after attention."""
        attention = self._block.self_attn
        assert isinstance(attention, GroupedQueryAttention)
        rotary = rotary_for(self._config, hidden.shape[1], hidden)
        features = _flat(attention.heads(self._block.input_layernorm(hidden), rotary), self._config.output_bias)
        self._gram += features.T @ features
        self._cross += features.T @ _flat(attended - hidden)

    def solve(self) -> Tensor:
        """The fitted o_proj, [features, hidden]."""
        return _solve(self._gram, self._cross)


def _joined(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Weight and bias of a linear layer as one float64 matrix [inputs (+ 1), outputs]."""
    weight = tensors[f"{name}.weight"].double().T
    bias = tensors.get(f"{name}.bias")
    return weight if bias is None else torch.cat([weight, bias.double()[None]])


def _with(start: Tensors, name: str, solution: Tensor) -> Tensors:
    """`start` with a linear layer replaced by a solution of :func:`_joined`'s form."""
    own = dict(start)
    weight = own[f"{name}.weight"]
    own[f"{name}.weight"] = solution[: weight.shape[1]].T.to(weight.dtype).contiguous()
    if f"{name}.bias" in own:
        own[f"{name}.bias"] = solution[-1].to(weight.dtype)
    return own


def _zeros(like: Tensor, columns: int) -> Tensor:
    return like.new_zeros(len(like), columns)


def _flat(hidden: Tensor, with_one: bool = False) -> Tensor:
    """[sequences, tokens, n] -> float32 [sequences x tokens, n], with a constant feature behind for a bias."""
    flat = hidden.flatten(0, 1).float()
    return torch.nn.functional.pad(flat, (0, 1), value=1.0) if with_one else flat


def _gram(features: Tensor, with_one: bool) -> Tensor:
    flat = _flat(features, with_one)
    return flat.T @ flat


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    """Ridge regression in float64 over features scaled to unit second moment, [features, targets]."""
    scale = gram.diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt()[:, None]
    normalised = gram / scale / scale.T
    normalised.diagonal().add_(RIDGE)
    return torch.cholesky_solve(cross / scale, torch.linalg.cholesky(normalised)) / scale
