"""Per-token losses of children against the parent, from the last hidden states.

In: last hidden states of the parent and of children, and the LM head. Out: KL, LM loss, top-1 agreement and cosine of
every token. They are summed up tile by tile, so that [tokens, vocabulary] logits never exist at once.

Logits are float32, whatever the weights are. Two logits that were rounded to bfloat16 apart differ by their rounding,
which adds about 0.001 nats to every KL (measured, docs/scores.md): a tenth of the smallest scores. So the parent's are
a float32 product, and a child's are the parent's plus the product of the head with the *difference* of the hidden
states, whose rounding is relative to the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tasks.puzzle.model.blocks import RMSNorm

_CPU_TILE = 256, 2_048
"""Tokens and words whose logits exist at once on a CPU: 2 MB stay in its cache between the product and the sums."""
_GPU_LOGITS = 1 << 27
"""Logits that exist at once on a GPU, 512 MiB: a product of a teraflop or so, against which a launch is nothing."""

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


def tile_sizes(device: torch.device, vocabulary: int) -> tuple[int, int]:
    """Return the numbers of tokens and of words whose logits exist at once on a device."""
    if device.type == "cpu":
        return _CPU_TILE
    return max(1, _GPU_LOGITS // vocabulary), vocabulary


def compare_with_parent(head: Head, tokens: Tensor, parent: Tensor, children: Sequence[Tensor]) -> list[TokenLosses]:
    """Compare children with the parent at every position that has a next token.

    Args:
        head: the parent's norm and LM head, which every child keeps.
        tokens: [sequences, tokens] int64.
        parent: hidden states before the final norm, [sequences, tokens, hidden].
        children: each child's hidden states before the final norm, in the same shape.

    Returns:
        One TokenLosses for each child. A child equal to the parent has a kl of exactly 0. The parent's logits are
        computed once for all children.
    """
    hidden = [states[:, :-1] for states in (parent, *children)]
    reference, *others = (head.normalise(states.float()).flatten(0, 1) for states in hidden)
    narrow = head.weight.dtype
    models = [_Relative((other - reference).to(narrow), head.weight) for other in others]
    return _compare(tokens, _Absolute(reference.to(narrow), head.weight), models, hidden)


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
    hidden = [states[:, :-1] for states, _ in (parent, *children)]
    weights = [weight for _, weight in (parent, *children)]
    reference, *models = (_Absolute(rows.flatten(0, 1), weight) for rows, weight in zip(hidden, weights, strict=True))
    return _compare(tokens, reference, models, hidden)


@dataclass(frozen=True)
class _Absolute:
    """A model's hidden states behind its final norm, [tokens, hidden], and its head, [vocabulary, hidden]."""

    rows: Tensor
    weight: Tensor

    def logits(self, tokens: slice, words: slice, _: Tensor | None = None) -> Tensor:
        """Compute a tile of the logits, [tokens, words] float32."""
        return float32_product(self.rows[tokens], self.weight[words])


@dataclass(frozen=True)
class _Relative:
    """A child with the parent's head, by the difference of its hidden states from the parent's, [tokens, hidden]."""

    difference: Tensor
    weight: Tensor

    def logits(self, tokens: slice, words: slice, parent: Tensor) -> Tensor:
        """Compute a tile of the logits from the parent's, [tokens, words] float32."""
        return functional.linear(self.difference[tokens], self.weight[words]) + parent


def float32_product(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows [tokens, hidden] with weight [words, hidden]; float32, whatever the factors are."""
    if rows.is_cuda:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return functional.linear(rows.float(), weight.float())  # a CPU's products have the type of their factors


def _compare(
    tokens: Tensor, parent: _Absolute, models: Sequence[_Absolute | _Relative], hidden: Sequence[Tensor]
) -> list[TokenLosses]:
    """Compute the losses of models against the parent; the cosines are of `hidden`, the parent's states first."""
    target = tokens[:, 1:].reshape(-1, 1)
    chunk_tokens, tile_words = tile_sizes(parent.weight.device, len(parent.weight))
    chunks = [
        _compare_chunk(parent, models, target, slice(start, start + chunk_tokens), tile_words)
        for start in range(0, len(target), chunk_tokens)
    ]
    losses = torch.cat(chunks, dim=-1).cpu().view(len(models), 3, tokens.shape[0], tokens.shape[1] - 1)
    reference, *others = (states.float() for states in hidden)
    cosines = [functional.cosine_similarity(states, reference, dim=-1).cpu() for states in others]
    return [TokenLosses(kl, lm, top1, cosine) for (kl, lm, top1), cosine in zip(losses, cosines, strict=True)]


def _compare_chunk(
    parent: _Absolute, models: Sequence[_Absolute | _Relative], targets: Tensor, chunk: slice, tile_words: int
) -> Tensor:
    """Compute KL, LM loss and top-1 of a chunk of tokens, [models, 3, tokens]; targets [all tokens, 1]."""
    target = targets[chunk]
    ours, sums = _Sums(target), [_Sums(target) for _ in models]
    for start in range(0, len(parent.weight), tile_words):
        words = slice(start, start + tile_words)
        logits = parent.logits(chunk, words)
        before = ours.highest
        ours.add(logits, start, target)
        probability = (logits - ours.highest).exp_()
        shrunk = (before - ours.highest).exp_()  # of what was summed up under the highest logit so far
        top = logits.max(-1, keepdim=True)
        rose = top.values > before
        ours.expect(logits, probability, shrunk)
        for model, of_model in zip(models, sums, strict=True):
            theirs = model.logits(chunk, words, logits)
            of_model.add(theirs, start, target)
            of_model.expect(theirs, probability, shrunk)
            of_model.at_likeliest = torch.where(rose, theirs.gather(-1, top.indices), of_model.at_likeliest)
    entropy = ours.cross_entropy(ours)
    losses = []
    for child in sums:
        top1 = (child.at_likeliest == child.highest).float()
        losses.append(torch.cat([child.cross_entropy(ours) - entropy, child.lm_loss(), top1], 1))
    return torch.stack(losses).mT


class _Sums:
    """Running sums over a model's logits, tile by tile of the vocabulary; each is [tokens, 1] float32."""

    def __init__(self, target: Tensor) -> None:
        zeros = torch.zeros(target.shape, device=target.device)
        self.highest = torch.full_like(zeros, -torch.inf)
        self.at_likeliest = zeros.clone()  # the logit of the parent's likeliest word so far
        self._at_target = zeros.clone()
        self._normaliser = zeros.clone()  # sum of exp(logit - highest)
        self._expected = zeros.clone()  # sum of logits times exp(parent's logit - the parent's highest)

    def add(self, logits: Tensor, start: int, target: Tensor) -> None:
        """Add the tile of logits, [tokens, words], that begins at word `start`."""
        highest = torch.maximum(self.highest, logits.amax(-1, keepdim=True))
        self._normaliser *= (self.highest - highest).exp_()
        self._normaliser += (logits - highest).exp_().sum(-1, keepdim=True)
        self.highest = highest
        self._at_target += _picked(logits, start, target)

    def expect(self, logits: Tensor, probability: Tensor, shrunk: Tensor) -> None:
        """Add a tile to the mean logit under the parent's distribution, and shrink what was added before."""
        self._expected *= shrunk
        self._expected += torch.linalg.vecdot(probability, logits)[:, None]

    def cross_entropy(self, parent: "_Sums") -> Tensor:
        """Return the mean under the parent's distribution of minus this model's log-probability, nats."""
        return self._log_normaliser() - self._expected / parent._normaliser

    def lm_loss(self) -> Tensor:
        """Return minus the log-probability of the target, nats."""
        return self._log_normaliser() - self._at_target

    def _log_normaliser(self) -> Tensor:
        return self._normaliser.log() + self.highest


def _picked(logits: Tensor, start: int, word: Tensor) -> Tensor:
    """Pick the logit of each token's `word` where the word lies in this tile, else 0; [tokens, 1]."""
    inside = (word >= start) & (word < start + logits.shape[1])
    return logits.gather(-1, (word - start).clamp(0, logits.shape[1] - 1)) * inside
