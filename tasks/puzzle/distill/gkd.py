"""Global knowledge distillation (GKD): the assembled child learns from the parent's hidden states.

In: a child's blocks, and the parent's hidden states at the boundaries for one sequence. Out: the loss and its
gradients. The loss (METHOD.md, GKD; arXiv 2411.19146, section 4) is the mean over blocks of 1 - cosine(child, parent)
of the hidden states, plus KL(parent || child) of the next-token distributions; there is no LM loss. The hidden states
come from the activation cache or from a :class:`Teacher`, the parent's logits from the last of them. Embedding, final
norm and LM head stay the parent's, so the child starts at boundary 0.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.model_config import ModelConfig
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.head import Head, tile_sizes
from tasks.puzzle.model.rotary import rotary_for

_CPU_CHUNK = 128
"""Tokens whose logits exist at once on a CPU: 25 MB in float32 with a vocabulary of 49,152; above 32 MB page faults set
in."""

States = Callable[[int], Tensor]
"""Returns the parent's hidden states at a boundary, [sequences, tokens, hidden], in the compute dtype."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss's two terms."""

    kl: float
    cosine: float


@dataclass(frozen=True)
class Losses:
    """Mean loss of sequences: KL in nats/token, 1 - cosine over blocks and tokens, and their weighted sum."""

    kl: float
    cosine: float
    total: float


class TrainableChild(nn.Module):
    """A child's blocks, all trainable.

    `ends[i]` is the parent's boundary that the output of block i is compared with, None where the cosine loss leaves it
    out; the last one is always given, since the KL needs it.
    """

    def __init__(self, config: ModelConfig, blocks: Sequence[Block], ends: Sequence[int | None]) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(blocks).requires_grad_(True)
        self.ends = list(ends)
        assert ends[-1] is not None
        self.last = ends[-1]

    def hidden_states(self, hidden: Tensor) -> list[Tensor]:
        """Compute the outputs of all blocks, each [sequences, tokens, hidden]."""
        rotary = rotary_for(self.config, hidden.shape[1], hidden)
        outputs = []
        for block in self.layers:
            hidden = block(hidden, rotary)
            outputs.append(hidden)
        return outputs


class Teacher:
    """The parent with all its blocks in memory, for sequences that the activation cache does not hold."""

    def __init__(self, config: ModelConfig, embedding: Tensor, blocks: Sequence[Block]) -> None:
        self._config, self._embedding, self._blocks = config, embedding, blocks

    def states(self, tokens: Tensor) -> States:
        """Compute the parent's hidden states at every boundary; tokens [sequences, tokens] int64."""
        with torch.no_grad():  # not inference mode: the child's gradients need boundary 0
            hidden = functional.embedding(tokens.to(self._embedding.device), self._embedding)
            rotary = rotary_for(self._config, hidden.shape[1], hidden)
            boundaries = [hidden]
            for block in self._blocks:
                hidden = block(hidden, rotary)
                boundaries.append(hidden)
        return boundaries.__getitem__


def gradients(child: TrainableChild, states: States, head: Head, weights: LossWeights) -> tuple[list[Tensor], Losses]:
    """Compute the loss of one sequence and its gradients.

    The gradients are returned, not accumulated in `.grad`, so that threads may share the child. Added up in the order
    of sequences they do not depend on the number of threads.

    Args:
        child: the blocks that train.
        states: the parent's hidden states of the sequence.
        head: the parent's final norm and LM head.
        weights: weights of the loss's terms.

    Returns:
        Gradients in the order of the child's parameters, and the loss.
    """
    outputs = child.hidden_states(states(0))
    pairs = zip(outputs, child.ends, strict=True)
    distances = [distance(output, states(end)) for output, end in pairs if end is not None]
    loss = loss_of(outputs[-1], distances, states(child.last), head, weights)
    computed = torch.autograd.grad(loss.parts, list(child.parameters()), loss.gradients)
    return list(computed), loss.losses


def distance(output: Tensor, target: Tensor) -> Tensor:
    """Compute the mean over tokens of 1 - cosine between two states [sequences, tokens, hidden], a float32 scalar."""
    return 1 - functional.cosine_similarity(output.float(), target.float(), dim=-1).mean()


@dataclass(frozen=True)
class DifferentiableLoss:
    """A loss as autograd takes it up: tensors that it is a function of, and its gradients with respect to them."""

    parts: list[Tensor]
    gradients: list[Tensor]
    losses: Losses


def loss_of(
    last: Tensor, distances: Sequence[Tensor], target: Tensor, head: Head, weights: LossWeights
) -> DifferentiableLoss:
    """Compute the loss of some sequences from what the child's blocks gave.

    Args:
        last: the child's last hidden states, [sequences, tokens, hidden].
        distances: :func:`distance` behind each block that the cosine loss is taken of.
        target: the parent's last hidden states, in the same shape.
        head: the parent's final norm and LM head.
        weights: weights of the loss's terms.
    """
    cosine = torch.stack(list(distances)).mean()
    rows = head.normalise(last).flatten(0, 1)
    with torch.no_grad():
        parent = head.normalise(target).flatten(0, 1)
        kl, kl_gradient = _kl_and_gradient(rows, parent, head.weight, with_gradient=True)
    terms = float(kl), float(cosine.detach())
    losses = Losses(*terms, total=weights.kl * terms[0] + weights.cosine * terms[1])
    gradients_of_parts = [weights.kl * kl_gradient, torch.full_like(cosine, weights.cosine)]
    return DifferentiableLoss([rows, cosine], gradients_of_parts, losses)


def sick_part(losses: Iterable[Losses], gradient_norm: float, named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name what is NaN or infinite in a step: a term of the loss, else a weight's gradient; None where nothing is.

    Args:
        losses: those of the step's sequences.
        gradient_norm: norm of the step's gradient over all weights.
        named: name and gradient of each weight.
    """
    for loss in losses:
        for term, amount in (("KL", loss.kl), ("cosine", loss.cosine)):
            if not math.isfinite(amount):
                return f"the loss's {term} term is {amount}"
    if math.isfinite(gradient_norm):
        return None
    sick = (name for name, gradient in named if not gradient.isfinite().all())
    return f"the gradient of {next(sick, 'all weights together')} is not finite"


def kl_to_parent(child: TrainableChild, states: States, head: Head) -> float:
    """Measure KL(parent || child) of one sequence, nats per token."""
    with torch.inference_mode():
        return kl_of(child.hidden_states(states(0))[-1], states(child.last), head)


def kl_of(last: Tensor, target: Tensor, head: Head) -> float:
    """Compute KL(parent || child), nats per token, from last hidden states [sequences, tokens, hidden] of both."""
    rows, parent = head.normalise(last).flatten(0, 1), head.normalise(target).flatten(0, 1)
    kl, _ = _kl_and_gradient(rows, parent, head.weight, with_gradient=False)
    return float(kl)


def chunk_tokens(device: torch.device, vocabulary: int) -> int:
    """Return how many tokens' logits exist at once on a device; four tensors of their size do."""
    if device.type == "cpu":
        return _CPU_CHUNK
    tokens, _ = tile_sizes(device, vocabulary)
    return max(1, tokens // 4)


def _kl_and_gradient(rows: Tensor, parent: Tensor, weight: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Compute the mean KL over tokens and its gradient with respect to the child's normalised hidden states.

    The gradient with respect to the child's logits is softmax(child) - softmax(parent), so it is carried to `rows` at
    once, chunk by chunk: no logits wait for a backward pass, and nothing is computed twice. The child's logits are the
    parent's plus the product of the head with the difference of the states, so that what the parent's are rounded to
    is the same on both sides and adds nothing to the KL (tasks/puzzle/model/head.py).

    Args:
        rows: the child's hidden states behind the final norm, [tokens, hidden].
        parent: the parent's, in the same shape.
        weight: the LM head, [vocabulary, hidden].
        with_gradient: whether the gradient is computed.

    Returns:
        The KL, nats per token, and its gradient, [tokens, hidden], empty if it is not computed.
    """
    difference = (rows.float() - parent.float()).to(weight.dtype)
    total = torch.zeros((), device=rows.device)
    gradient = torch.empty_like(rows) if with_gradient else rows.new_empty(0)
    size = chunk_tokens(weight.device, len(weight))
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        logits = functional.linear(parent[chunk], weight).float()
        theirs = logits.log_softmax(-1)
        ours = logits.add_(functional.linear(difference[chunk], weight)).log_softmax(-1)
        probability = theirs.exp()
        total += torch.linalg.vecdot(probability, theirs - ours).sum()
        if with_gradient:
            excess = ours.exp_().sub_(probability).to(weight.dtype)
            gradient[chunk] = (excess @ weight) / len(rows)
    return total / len(rows), gradient
