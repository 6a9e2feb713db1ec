"""Global knowledge distillation (GKD): the assembled child learns from the parent's cached hidden states.

In: a child's blocks and the parent's hidden states at the boundaries of one sequence. Out: the loss and its gradients.
Loss (METHOD.md, GKD; arXiv 2411.19146, section 4): the mean over blocks of 1 - cosine(child, parent) of the hidden
states, plus KL(parent || child) of the next-token distributions; no LM loss. There is no teacher forward: the parent's
states come from the activation cache and its logits from the last of them. Embedding, final norm and head stay the
parent's, so the child starts at the cached boundary 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.model_config import ModelConfig
from tasks.puzzle.blocks import Block
from tasks.puzzle.head import Head
from tasks.puzzle.rotary import rotary_for

_CHUNK_TOKENS = 128
"""Tokens whose logits exist at once: 25 MB in float32 at a vocabulary of 49,152; above 32 MB page faults set in."""

States = Callable[[int], Tensor]
"""The parent's hidden states at a boundary, [1, tokens, hidden], in the dtype of compute."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the two terms."""

    kl: float
    cosine: float


@dataclass(frozen=True)
class Losses:
    """Terms of one sequence: KL in nats per token, mean 1 - cosine over blocks and tokens, their weighted sum."""

    kl: float
    cosine: float
    total: float


class Child(nn.Module):
    """A child's blocks, trainable; `ends[i]` is the parent's boundary that block i's output answers to, if any."""

    def __init__(self, config: ModelConfig, blocks: Sequence[Block], ends: Sequence[int | None]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(blocks).requires_grad_(True)
        self.ends = list(ends)
        assert ends[-1] is not None  # the KL needs the parent's last boundary
        self.last = ends[-1]

    def hidden_states(self, hidden: Tensor) -> list[Tensor]:
        """Outputs of all blocks, each [sequences, tokens, hidden]."""
        rotary = rotary_for(self.config, hidden.shape[1], hidden)
        outputs = []
        for block in self.layers:
            hidden = block(hidden, rotary)
            outputs.append(hidden)
        return outputs


def gradients(child: Child, states: States, head: Head, weights: LossWeights) -> tuple[list[Tensor], Losses]:
    """Gradients of the loss of one sequence, in the order of the child's parameters.

    They are returned, not accumulated in `.grad`, so that threads may share the child; added up in the order of
    sequences they do not depend on how many threads there were.
    """
    outputs = child.hidden_states(states(0))
    distances = [
        1 - functional.cosine_similarity(output.float(), states(end).float(), dim=-1).mean()
        for output, end in zip(outputs, child.ends, strict=True)
        if end is not None
    ]
    cosine = torch.stack(distances).mean()
    rows = head.normalise(outputs[-1]).flatten(0, 1)
    with torch.no_grad():
        parent = head.normalise(states(child.last)).flatten(0, 1)
        kl, of_rows = _kl_and_gradient(rows, parent, head.weight, with_gradient=True)
    found = torch.autograd.grad(
        [rows, cosine], list(child.parameters()), [weights.kl * of_rows, torch.full_like(cosine, weights.cosine)]
    )
    terms = float(kl), float(cosine.detach())
    return list(found), Losses(*terms, total=weights.kl * terms[0] + weights.cosine * terms[1])


def kl_to_parent(child: Child, states: States, head: Head) -> float:
    """KL(parent || child) of one sequence, nats per token."""
    with torch.inference_mode():
        rows = head.normalise(child.hidden_states(states(0))[-1]).flatten(0, 1)
        parent = head.normalise(states(child.last)).flatten(0, 1)
        kl, _ = _kl_and_gradient(rows, parent, head.weight, with_gradient=False)
    return float(kl)


def _kl_and_gradient(rows: Tensor, parent: Tensor, weight: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Mean KL over rows and its gradient with respect to them (empty without); both [tokens, hidden].

    The gradient with respect to the child's logits is softmax(child) - softmax(parent), so it is taken to the rows at
    once, chunk by chunk: no logits wait for a backward pass, and nothing is computed twice.
    """
    total = torch.zeros((), device=rows.device)
    gradient = torch.empty_like(rows) if with_gradient else rows.new_empty(0)
    for start in range(0, len(rows), _CHUNK_TOKENS):
        chunk = slice(start, start + _CHUNK_TOKENS)
        theirs = functional.linear(parent[chunk], weight).float().log_softmax(-1)
        ours = functional.linear(rows[chunk], weight).float().log_softmax(-1)
        probability = theirs.exp()
        total += torch.linalg.vecdot(probability, theirs - ours).sum()
        if with_gradient:
            difference = ours.exp_().sub_(probability).to(weight.dtype)
            gradient[chunk] = (difference @ weight) / len(rows)
    return total / len(rows), gradient
