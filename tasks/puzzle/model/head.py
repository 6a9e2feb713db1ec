"""Per-token losses of children against the parent, from the last hidden states.

In: last hidden states of the parent and of children, and the LM head. Out: KL, LM loss, top-1 agreement and cosine of
every token. They are summed up tile by tile, so that [tokens, vocabulary] logits never exist at once. A tile of 256
tokens x 2,048 words is 2 MB of float32 and stays in a CPU's cache between the product and the sums over it: measured
79 GFLOP/s with log-sum-exp, where 128 tokens x the whole vocabulary gave 55 (AVX2, one thread).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tasks.puzzle.model.blocks import RMSNorm

CHUNK_TOKENS = 256
TILE_WORDS = 2_048

Projected = tuple[Tensor, Tensor]
"""Hidden states behind the final norm, [sequences, tokens, hidden], and the LM head, [vocabulary, hidden]."""


@dataclass(frozen=True)
class Head:
    """Final norm and LM head of the parent: norm [hidden], weight [vocabulary, hidden], eps of the norm."""

    norm: Tensor
    weight: Tensor
    eps: float

    def normalise(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to [..., hidden]."""
        module = RMSNorm(self.norm.numel(), self.eps)
        module.weight = torch.nn.Parameter(self.norm, requires_grad=False)
        normalised: Tensor = module(hidden)
        return normalised


@dataclass(frozen=True)
class TokenLosses:
    """A child compared with the parent token by token.

    Each field is [sequences, tokens - 1] float32, since the last token of a sequence predicts nothing.

    kl: KL(parent || child) of the next-token distribution, nats (METHOD.md, Scoring).
    lm_loss: negative log-likelihood of the next token, nats.
    top1: 1 where parent and child rank the same token first, else 0.
    cosine: similarity of the last hidden states, before the final norm.
    """

    kl: Tensor
    lm_loss: Tensor
    top1: Tensor
    cosine: Tensor


def compare_with_parent(head: Head, tokens: Tensor, parent: Tensor, children: Sequence[Tensor]) -> list[TokenLosses]:
    """Compare children with the parent at every position that has a next token.

    Args:
        head: the parent's norm and LM head, which every child keeps.
        tokens: [sequences, tokens] int64.
        parent: hidden states before the final norm, [sequences, tokens, hidden].
        children: each child's hidden states before the final norm, in the same shape.

    Returns:
        One TokenLosses for each child. A child equal to the parent has a kl of exactly 0, since both sides round alike.
        The parent's probabilities are computed once for all children.
    """
    normalised = [head.normalise(hidden[:, :-1]) for hidden in (parent, *children)]
    models = [(hidden, head.weight) for hidden in normalised]
    return _compare(tokens, models, [hidden[:, :-1] for hidden in (parent, *children)])


def compare_models(tokens: Tensor, parent: Projected, children: Sequence[Projected]) -> list[TokenLosses]:
    """Compare models that have an LM head each, over one vocabulary, with the parent.

    Args:
        tokens: [sequences, tokens] int64.
        parent: the model to compare with: its hidden states behind the final norm, [sequences, tokens, hidden], and its
            head's weight, [vocabulary, hidden].
        children: the models to compare, in the same form.

    Returns:
        One TokenLosses for each child; its cosine is of the hidden states behind the final norm.
    """
    models = [(hidden[:, :-1], weight) for hidden, weight in (parent, *children)]
    return _compare(tokens, models, [hidden for hidden, _ in models])


def _compare(tokens: Tensor, models: Sequence[Projected], hidden: Sequence[Tensor]) -> list[TokenLosses]:
    """Compute the losses of models[1:] against models[0]; the cosines are taken of `hidden`, an entry per model."""
    target = tokens[:, 1:].reshape(-1, 1)
    rows, weights = [hidden_rows.flatten(0, 1) for hidden_rows, _ in models], [weight for _, weight in models]
    chunks = []
    for start in range(0, len(target), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        chunks.append(_compare_chunk(weights, target[chunk], [row[chunk] for row in rows]))
    losses = torch.cat(chunks, dim=-1).cpu().view(len(models) - 1, 3, tokens.shape[0], tokens.shape[1] - 1)
    reference, *others = (states.float() for states in hidden)
    cosines = [functional.cosine_similarity(states, reference, dim=-1).cpu() for states in others]
    return [TokenLosses(kl, lm, top1, cosine) for (kl, lm, top1), cosine in zip(losses, cosines, strict=True)]


def _compare_chunk(weights: Sequence[Tensor], target: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Compute KL, LM loss and top-1 of rows[1:] against rows[0], [children, 3, tokens], from target [tokens, 1]."""
    parent = _Sums(rows[0])
    likeliest = torch.zeros_like(target)
    tiles = range(0, len(weights[0]), TILE_WORDS)
    for start in tiles:
        logits = _logits(rows[0], weights[0], start)
        top = logits.max(-1, keepdim=True)
        likeliest = torch.where(top.values > parent.highest, top.indices + start, likeliest)
        parent.add(logits)
    parent_normaliser = parent.log_normaliser()
    sums = [_Sums(row) for row in rows]
    for start in tiles:
        reference = _logits(rows[0], weights[0], start)
        probability = (reference - parent_normaliser).exp_()
        for model, row, weight in zip(sums, rows, weights, strict=True):
            logits = reference if row is rows[0] else _logits(row, weight, start)
            model.add(logits)
            model.expected += torch.linalg.vecdot(probability, logits)[:, None]
            model.at_target += _picked(logits, start, target)
            model.at_likeliest += _picked(logits, start, likeliest)
    entropy, *cross_entropies = (model.log_normaliser() - model.expected for model in sums)
    losses = []
    for child, cross_entropy in zip(sums[1:], cross_entropies, strict=True):
        lm_loss = child.log_normaliser() - child.at_target
        losses.append(torch.cat([cross_entropy - entropy, lm_loss, (child.at_likeliest == child.highest).float()], 1))
    return torch.stack(losses).mT


def _logits(rows: Tensor, weight: Tensor, start: int) -> Tensor:
    """Compute the logits of the vocabulary's tile that begins at `start`, [tokens, words] float32."""
    return functional.linear(rows, weight[start : start + TILE_WORDS]).float()


class _Sums:
    """Running sums over a model's logits, tile by tile of the vocabulary; each is [tokens, 1]."""

    def __init__(self, rows: Tensor) -> None:
        zeros = torch.zeros(len(rows), 1, device=rows.device)
        self.highest = torch.full_like(zeros, -torch.inf)
        self.expected = zeros.clone()  # the mean logit under the parent's probabilities
        self.at_target = zeros.clone()
        self.at_likeliest = zeros.clone()
        self._normaliser = zeros.clone()  # sum of exp(logit - highest)

    def add(self, logits: Tensor) -> None:
        """Add a tile of logits, [tokens, words], to the highest logit and the normaliser."""
        highest = torch.maximum(self.highest, logits.amax(-1, keepdim=True))
        self._normaliser *= (self.highest - highest).exp_()
        self._normaliser += (logits - highest).exp_().sum(-1, keepdim=True)
        self.highest = highest

    def log_normaliser(self) -> Tensor:
        """Return log sum exp over the tiles so far."""
        return self._normaliser.log() + self.highest


def _picked(logits: Tensor, start: int, word: Tensor) -> Tensor:
    """Pick the logit of each token's `word` where the word lies in this tile, else 0; [tokens, 1]."""
    inside = (word >= start) & (word < start + logits.shape[1])
    return logits.gather(-1, (word - start).clamp(0, logits.shape[1] - 1)) * inside
