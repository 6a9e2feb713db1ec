"""Whole-child correction in closed form: one subblock of an assembled child, refitted on the child's own hidden states.

In: a child's block, the parent's states around it, and the child's own state before it. Out: the block with o_proj,
then down_proj (or the only matrix of a linear variant) changed, so that the state behind each subblock comes closest to
the parent's at the same place. Walked through once from the first replaced block to the last block of the child
(tasks/refine_child.py), so that what one block loses is made good by those behind it: after a removed attention the FFN
that follows takes over most.

    D = argmin  sum over tokens  w |r - x D|^2  +  ridge * sum over features j  s_j |D_j|^2

r is the parent's state less the child's, x the layer's input on the child's state, s_j the weighted second moment of
feature j, and w = 1 / |parent's state|: unweighted, 1 % of the tokens would be nearly all of the sum (measured against
1 and 1 / |state|^2: docs/distillation.md). D is a change of the weights, so that a large ridge leaves them as they are.
The strength of the ridge is the one with the lowest weighted error on held-out tokens; "no change" is among the
candidates.

Puzzle's papers have no such step. Its relatives, which fit a layer on the inputs that the changed model gives it: GPTAQ
and QEP for quantisation, SVD-LLM's sequential update for low rank, Prune&Comp for removed layers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from storage.model_config import ModelConfig
from storage.refinement import SubblockName
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.distill.output_layers import (
    attention_features,
    ffn_features,
    flat,
    joined,
    output_layer,
    solve_ridge,
    with_layer,
)
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.initialise import Tensors
from tasks.puzzle.model.rotary import rotary_for

RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3)
"""Strengths of the ridge, as shares of the features' second moments."""

Attempt = tuple[float, Tensors, float]
"""A ridge, the block's tensors with it, and their error on the held-out tokens."""
Each = Callable[[Callable[[int], Attempt], int], Iterable[Attempt]]
"""Calls a function with 0, 1, ..., below a number, and yields what it returns in order."""


@dataclass(frozen=True)
class ParentStates:
    """The parent's hidden states of some sequences around a child's block, [sequences, tokens, hidden] each.

    before: at the boundary before the block.
    behind: at the boundary behind the block (behind the last one of a span).
    """

    before: Tensor
    behind: Tensor


@dataclass
class Moments:
    """Sums over tokens for one linear layer, weighted by 1 / |target| of each token.

    gram: products of the layer's inputs with each other, [inputs (+ 1 for the bias), inputs (+ 1)].
    cross: products of the inputs with what is missing to the target, [inputs (+ 1), outputs].
    error: squared norm of what is missing, a float64 scalar.
    target: squared norm of the target, a float64 scalar.
    """

    gram: Tensor
    cross: Tensor
    error: Tensor
    target: Tensor

    @classmethod
    def of(cls, features: Tensor, missing: Tensor, target: Tensor) -> Self:
        """Sum over float32 `features` [tokens, inputs], `missing` and `target` [tokens, outputs]."""
        scale = _inverse_lengths(target).sqrt()
        weighted_features, weighted_missing = features * scale, missing * scale
        return cls(
            weighted_features.T @ weighted_features,
            weighted_features.T @ weighted_missing,
            weighted_missing.square().sum(dtype=torch.float64),
            (target * scale).square().sum(dtype=torch.float64),
        )

    def add(self, moments: Self) -> None:
        """Add the sums over other tokens."""
        self.gram += moments.gram
        self.cross += moments.cross
        self.error += moments.error
        self.target += moments.target

    def error_after(self, change: Tensor) -> float:
        """Compute |missing|^2 as a share of |target|^2, both weighted, after a float64 `change` of the layer."""
        products = self.gram.double() @ change - 2 * self.cross.double()
        return float((self.error + (change * products).sum()) / self.target)


@dataclass(frozen=True)
class Correction:
    """The correction of one subblock.

    ridge: the strength that was chosen; None if the weights stay as they were.
    error_before: |parent's state - child's|^2 behind the subblock as a share of |parent's|^2, both summed over held-out
        tokens with the fit's weights.
    error_after: the same with the weights that are kept, rounded as they are stored.
    """

    ridge: float | None
    error_before: float
    error_after: float


def corrected_subblocks(replacement: Replacement) -> tuple[SubblockName, ...]:
    """List the subblocks of a child's block that are corrected, in order.

    An attention before the FFN of a span is not among them: the parent has no state that it should reach.
    """
    names: list[SubblockName] = []
    if replacement.attention.kind != "no_op" and (replacement.span == 1 or replacement.ffn.kind == "no_op"):
        names.append("attention")
    if replacement.ffn.kind != "no_op":
        names.append("ffn")
    return tuple(names)


def moments(
    config: ModelConfig, subblock: SubblockName, block: Block, parent_block: Block, hidden: Tensor, parent: ParentStates
) -> Moments:
    """Sum up what a correction needs, over some sequences.

    Args:
        config: geometry of the parent.
        subblock: the one to correct.
        block: the child's block, with the weights of now.
        parent_block: the parent's block; an attention that an FFN follows is compared with the state behind its
            attention, every other subblock with the boundary behind the block.
        hidden: the child's states before the block, [sequences, tokens, hidden], in the dtype of compute.
        parent: the parent's states around it.
    """
    with torch.no_grad():
        rotary = rotary_for(config, hidden.shape[1], hidden)
        target = parent.behind
        if subblock == "attention":
            before, features = hidden, attention_features(block, hidden, rotary)
            if block.ffn.kind != "no_op":
                target = parent_block.attend(parent.before, rotary)
        else:
            before = block.attend(hidden, rotary)
            features = ffn_features(block, before)
        layer = block.get_submodule(_layer(block, subblock))
        reached = before + layer(features)
        wide = flat(target)
        return Moments.of(flat(features, layer.bias is not None), wide - flat(reached), wide)


def correct(
    tensors: Tensors, variant: Attention | Ffn, fitted_on: Moments, held_out: Moments, compute_each: Each
) -> tuple[Tensors, Correction]:
    """Correct the subblock that is a `variant`.

    Args:
        tensors: the block's tensors in the dtype of the child's checkpoint, to which the new weights are rounded once.
        variant: the block's attention or FFN.
        fitted_on: sums over the tokens of the fit.
        held_out: sums over the tokens that choose the ridge. They are tried from the strongest on, until one is worse
            than the one before it.
        compute_each: computes what is tried, in order; it may be ahead of what is asked for.

    Returns:
        All tensors of the block, and the correction. The held-out error never rises.
    """
    name = output_layer(variant)
    weights = joined(tensors, name).to(fitted_on.gram.device)
    before = held_out.error_after(torch.zeros_like(weights))

    def attempt(number: int) -> Attempt:
        ridge = RIDGES[number]
        changed = with_layer(tensors, name, weights + solve_ridge(fitted_on.gram, fitted_on.cross, ridge))
        return ridge, changed, held_out.error_after(joined(changed, name).to(weights.device) - weights)

    best_tensors, best = tensors, Correction(None, before, before)
    for ridge, changed, error in compute_each(attempt, len(RIDGES)):
        if not error < best.error_after:
            break
        best_tensors, best = changed, Correction(ridge, before, error)
    return best_tensors, best


def relative_error(states: Tensor, target: Tensor) -> float:
    """Compute the mean over tokens of |target - states|^2 / |target|^2, each [sequences, tokens, hidden]."""
    wide = flat(target)
    missing = (wide - flat(states)) * _inverse_lengths(wide)
    return float(missing.square().sum(dtype=torch.float64)) / len(missing)


def _inverse_lengths(target: Tensor) -> Tensor:
    """Compute 1 / |target| of each token, [tokens, 1]; 0 for a token without a length, which so has no weight."""
    lengths = torch.linalg.vector_norm(target, dim=-1, keepdim=True)
    return torch.where(lengths > 0, 1 / lengths, 0)


def _layer(block: Block, subblock: SubblockName) -> str:
    return output_layer(block.attention if subblock == "attention" else block.ffn)
