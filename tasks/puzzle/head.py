"""From the last hidden state to per-token losses, in chunks: [tokens, vocabulary] logits never exist at once.

Temporaries above 32 MB cost page faults (STACK.md), so a chunk is 128 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tasks.puzzle.blocks import RMSNorm

CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Head:
    """Final norm and LM head of the parent: norm [hidden], weight [vocabulary, hidden], eps of the norm."""

    norm: Tensor
    weight: Tensor
    eps: float

    def normalise(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        module = RMSNorm(self.norm.numel(), self.eps)
        module.weight = torch.nn.Parameter(self.norm, requires_grad=False)
        normalised: Tensor = module(hidden)
        return normalised


@dataclass(frozen=True)
class TokenLosses:
    """Per-token comparison with the parent, each [sequences, tokens - 1] float32 (the last token predicts nothing).

    kl: KL(parent || child) of the next-token distribution, nats (METHOD.md, Scoring).
    lm_loss: negative log-likelihood of the next token, nats.
    top1: 1 where parent and child put the same token first.
    """

    kl: Tensor
    lm_loss: Tensor
    top1: Tensor


def compare_with_parent(head: Head, tokens: Tensor, parent: Tensor, children: Sequence[Tensor]) -> list[TokenLosses]:
    """Compare children with the parent at every position that has a next token.

    Args:
        head: the parent's norm and LM head, which every child keeps.
        tokens: [sequences, tokens] int64.
        parent: hidden states before the final norm, [sequences, tokens, hidden].
        children: the same for each child.

    Returns:
        One TokenLosses for each child. A child equal to the parent has kl exactly 0: both sides round alike.
        The parent's log-probabilities are computed once for all children.
    """
    num_sequences, num_predictions = tokens.shape[0], tokens.shape[1] - 1
    target = tokens[:, 1:].reshape(-1, 1)
    parent_rows, *rows = (head.normalise(hidden[:, :-1]).flatten(0, 1) for hidden in (parent, *children))
    out = torch.empty(len(rows), 3, num_sequences * num_predictions)
    for start in range(0, len(target), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        reference = functional.linear(parent_rows[chunk], head.weight).float()
        best = reference.argmax(-1, keepdim=True)
        log_normaliser = _logsumexp(reference)
        probability = (reference - log_normaliser).exp_()
        expected = torch.linalg.vecdot(probability, reference) - log_normaliser[:, 0]
        for index, row in enumerate(rows):
            logits = functional.linear(row[chunk], head.weight).float()
            highest = logits.amax(-1, keepdim=True)
            out[index, 2, chunk] = (logits.gather(-1, best) == highest)[:, 0].float()
            cross, likelihood = torch.linalg.vecdot(probability, logits), logits.gather(-1, target[chunk])[:, 0]
            normaliser = _logsumexp(logits, highest)[:, 0]
            out[index, 0, chunk] = expected - (cross - normaliser)
            out[index, 1, chunk] = normaliser - likelihood
    shaped = out.view(len(rows), 3, num_sequences, num_predictions)
    return [TokenLosses(kl=one[0], lm_loss=one[1], top1=one[2]) for one in shaped]


def _logsumexp(logits: Tensor, highest: Tensor | None = None) -> Tensor:
    """log sum exp over the last dimension, [rows, 1]; quicker here than torch.logsumexp, which copies twice."""
    top = logits.amax(-1, keepdim=True) if highest is None else highest
    return (logits - top).exp_().sum(-1, keepdim=True).log_() + top
