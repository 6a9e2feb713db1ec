"""Losses of BLD between a child block's output and the parent's: float32 scalars, 0 where both are equal.

normalised_mse is the published loss (METHOD.md, BLD; arXiv 2411.19146, 3.2). It weighs tokens by their squared norm,
and the hidden states of a few tokens are a hundred times as long as the others. The other two weigh all tokens alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target), each [..., hidden] -> a float32 scalar."""


def normalised_mse(output: Tensor, target: Tensor) -> Tensor:
    """Compute mean((output - target)^2) / mean(target^2)."""
    wide = target.float()
    return (output.float() - wide).square().mean() / wide.square().mean()


def token_mse(output: Tensor, target: Tensor) -> Tensor:
    """Compute the mean over tokens of |output - target|^2 / |target|^2."""
    wide = target.float()
    lengths = wide.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output.float() - wide).square().sum(-1) / lengths).mean()


def cosine(output: Tensor, target: Tensor) -> Tensor:
    """Compute the mean over tokens of 1 - cos(output, target)."""
    return (1 - functional.cosine_similarity(output.float(), target.float(), dim=-1)).mean()


LOSSES: dict[str, Loss] = {"normalised_mse": normalised_mse, "token_mse": token_mse, "cosine": cosine}
"""The losses by their names in distill_blocks.loss."""
