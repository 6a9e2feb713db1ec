"""Losses of BLD between a child block's output and the parent's, each a scalar in float32 that 0 means equal.

normalised_mse is the published one (METHOD.md, BLD; arXiv 2411.19146, 3.2). It weighs tokens by their size, and hidden
states have a few that are a hundred times as long as the others; the other two weigh all tokens alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, target), each [..., hidden] -> a scalar."""


def normalised_mse(output: Tensor, target: Tensor) -> Tensor:
    """mean((output - target)^2) / mean(target^2)."""
    wide = target.float()
    return (output.float() - wide).square().mean() / wide.square().mean()


def token_mse(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of |output - target|^2 / |target|^2."""
    wide = target.float()
    lengths = wide.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output.float() - wide).square().sum(-1) / lengths).mean()


def cosine(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of 1 - cos(output, target)."""
    return (1 - functional.cosine_similarity(output.float(), target.float(), dim=-1)).mean()


LOSSES: dict[str, Loss] = {"normalised_mse": normalised_mse, "token_mse": token_mse, "cosine": cosine}
