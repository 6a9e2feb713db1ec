"""Blockwise local distillation (BLD), decoupled: all variants of one block train in one pass over its activations.

In: a parent block's tensors and the hidden states at its two boundaries. Out: the trained tensors of every variant,
with the losses before and after. Each variant reads the parent's activations (METHOD.md, BLD; arXiv 2411.19146, 3.2).
An attention variant trains with the parent's FFN frozen, an FFN variant with the parent's attention frozen, so that the
parent's attention output is computed once for all FFN variants. Norms stay the parent's: their weight is a diagonal
factor of the matrices that follow, and those train.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn
from tasks.puzzle.distill.losses import Loss, normalised_mse
from tasks.puzzle.distill.optimizer import MasterWeights, Schedule
from tasks.puzzle.model.blocks import Block, GatedFfn
from tasks.puzzle.model.initialise import Tensors, attention_part, channel_contribution, channel_order, ffn_part
from tasks.puzzle.model.rotary import Rotary, rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn

K = TypeVar("K", bound=Hashable)
Batch = tuple[Tensor, Tensor]
"""A block's input and target, each [sequences, tokens, hidden]."""


@dataclass(frozen=True)
class Trained:
    """A variant after BLD: whichever of initial weights, closed-form start and trained weights has the lowest loss.

    The losses are held-out losses of the kind that training lowers.

    tensors: the weights that are kept.
    loss_before: loss of the initial weights.
    loss_fitted: loss of the closed-form start; the steps begin from the better of the two.
    loss_after: loss of the kept weights; where training did not help, the loss that it reached.
    improved: whether training helped; if not, the initial weights are kept.
    steps: steps that were taken until the training ended or stopped early.
    """

    tensors: Tensors
    loss_before: float
    loss_fitted: float
    loss_after: float
    improved: bool
    steps: int


@dataclass(frozen=True)
class Recipe:
    """The training of a variant: steps, learning rate, and when to stop early.

    Every `check_steps` steps (0: never) the held-out loss is measured. After `patience` checks in a row without a new
    lowest loss the training stops. The weights of the lowest loss are kept.
    """

    schedule: Schedule
    check_steps: int = 0
    patience: int = 1


def rank_channels(config: ModelConfig, parent: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> Tensor:
    """Rank the FFN channels of a parent block.

    Args:
        config: geometry of the parent.
        parent: tensors of the parent's block.
        inputs: hidden states at the block's input boundary, [sequences, tokens, hidden] each, read once.

    Returns:
        Channels from the most to the least important, [intermediate] int64.
    """
    block = Block.load(config, parent_attention(config), parent_ffn(config), parent)
    total = torch.zeros(config.intermediate_size, dtype=torch.float64)
    num_tokens = 0
    assert isinstance(block.mlp, GatedFfn)
    with torch.inference_mode():
        for hidden in inputs:
            normed = block.post_attention_layernorm(block.attend(hidden, rotary_for(config, hidden.shape[1], hidden)))
            total += block.mlp.channels(normed).abs().sum((0, 1), dtype=torch.float64).cpu()
            num_tokens += hidden.shape[0] * hidden.shape[1]
    return channel_order(channel_contribution(total, num_tokens, parent["mlp.down_proj.weight"].cpu()))


Forward = Callable[[Tensor, Tensor, Rotary], Tensor]
"""(block input, parent's hidden states behind attention, rotary) -> block output; hidden states are [sequences, tokens,
hidden]."""


@dataclass
class _VariantTraining:
    """The training of one variant: its block, the steps so far, and the weights with the lowest loss until now.

    `kept` and `lowest_loss` are at first the start's tensors and held-out loss; `kept` names the tensors that train.
    """

    block: Block
    recipe: Recipe
    kept: Tensors
    lowest_loss: float
    forward: Forward
    steps: int = 0
    checks_since: int = 0

    def __post_init__(self) -> None:
        self.masters = MasterWeights(self.block, self.recipe.schedule)

    def tensors(self) -> Tensors:
        return {name: self.block.state_dict()[name].clone() for name in self.kept}

    @property
    def has_ended(self) -> bool:
        return self.steps == self.recipe.schedule.num_steps or self.checks_since == self.recipe.patience

    @property
    def is_due(self) -> bool:
        return self.recipe.check_steps > 0 and self.steps % self.recipe.check_steps == 0

    def check(self, loss: float) -> None:
        self.checks_since += 1
        if loss < self.lowest_loss:
            self.lowest_loss, self.kept, self.checks_since = loss, self.tensors(), 0


def distill_block(
    config: ModelConfig,
    parent: Mapping[str, Tensor],
    starts: Mapping[Attention | Ffn, Tensors],
    fitted: Mapping[Attention | Ffn, Tensors],
    batches: Iterable[Batch],
    held_out: Iterable[Batch],
    recipes: Mapping[Attention | Ffn, Recipe],
    loss: Loss = normalised_mse,
) -> dict[Attention | Ffn, Trained]:
    """Train every variant of one block.

    Args:
        config: geometry of the parent.
        parent: tensors of the parent's block (a span's whole block), in the dtype of compute.
        starts: initial tensors of each variant to train (its own subblock only).
        fitted: another start of each variant: from least_squares.fit_outputs, or `starts` again.
        batches: training batches in order, one per step, as many as the longest schedule has.
        held_out: batches for the held-out losses.
        recipes: the recipe of each variant.
        loss: the loss that training lowers; it is measured on the held-out batches, too.

    Returns:
        The weights to keep of each variant. A variant's bytes do not depend on which others train beside it.
    """
    parent_block = Block.load(config, parent_attention(config), parent_ffn(config), parent)
    held = _HeldOut(config, parent_block, list(held_out), loss)

    def held_out_losses(tensors: Mapping[Attention | Ffn, Tensors]) -> dict[Attention | Ffn, float]:
        return held.losses({variant: _load(config, parent, variant, start)[1] for variant, start in tensors.items()})

    before, between = held_out_losses(starts), held_out_losses(fitted)
    trainings = {}
    for variant, start in starts.items():
        better, lowest_loss = start, before[variant]
        if between[variant] < lowest_loss:
            better, lowest_loss = fitted[variant], between[variant]
        trainings[variant] = _begin(config, parent, variant, better, lowest_loss, recipes[variant])
    _train(trainings, batches, held)
    after = held.losses({variant: training.forward for variant, training in trainings.items()})
    return {
        variant: _best(start, trainings[variant], before[variant], between[variant], after[variant])
        for variant, start in starts.items()
    }


def distill_whole(
    config: ModelConfig,
    blocks: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Batch],
    held_out: Iterable[Batch],
    recipe: Recipe,
    loss: Loss = normalised_mse,
) -> tuple[Trained, int]:
    """Train one block in place of several, both subblocks together.

    Args:
        config: geometry of the parent.
        blocks: tensors of the parent's blocks that it replaces. It starts as the block that alone has the lowest loss.
        batches: training batches in order: hidden states before the first block and behind the last one.
        held_out: batches for the held-out losses, in the same form.
        recipe: the block's recipe.
        loss: the loss that training lowers; it is measured on the held-out batches, too.

    Returns:
        The block's weights to keep, and the index in `blocks` of its start.
    """

    def load(tensors: Mapping[str, Tensor]) -> Block:
        return Block.load(config, parent_attention(config), parent_ffn(config), tensors)

    held = _HeldOut(config, None, list(held_out), loss)
    losses = held.losses({index: _whole_forward(load(tensors)) for index, tensors in enumerate(blocks)})
    start = min(losses, key=lambda index: (losses[index], index))
    initial = dict(blocks[start])
    block = load({name: tensor.clone() for name, tensor in initial.items()})
    block.self_attn.requires_grad_(True)
    block.mlp.requires_grad_(True)
    training = _VariantTraining(block, recipe, initial, losses[start], _whole_forward(block))
    _train({start: training}, batches, held)
    after = held.losses({start: training.forward})[start]
    return _best(initial, training, losses[start], losses[start], after), start


def _whole_forward(block: Block) -> Forward:
    """Return a forward pass through both subblocks of `block`, from its input."""
    return lambda hidden, _, rotary: block(hidden, rotary)


def _train(trainings: Mapping[K, _VariantTraining], batches: Iterable[Batch], held_out: "_HeldOut") -> None:
    """Take one step of every training per batch; the parent's attention, which they share, is computed once."""
    config, parent_block = held_out.config, held_out.parent_block
    for hidden, target in batches:
        rotary = rotary_for(config, hidden.shape[1], hidden)
        attended = _attended(parent_block, hidden, rotary)
        running = {key: training for key, training in trainings.items() if not training.has_ended}
        for training in running.values():
            torch.autograd.backward(held_out.loss(training.forward(hidden, attended, rotary), target))
            training.masters.step()
            training.steps += 1
        due = {key: training.forward for key, training in running.items() if training.is_due}
        for key, loss_now in held_out.losses(due).items():
            trainings[key].check(loss_now)
        if all(training.has_ended for training in trainings.values()):
            return


def _begin(
    config: ModelConfig,
    parent: Mapping[str, Tensor],
    variant: Attention | Ffn,
    start: Tensors,
    loss: float,
    recipe: Recipe,
) -> _VariantTraining:
    """Begin a variant's training from a copy of `start`, whose held-out loss is `loss`; norms do not train."""
    block, forward = _load(config, parent, variant, {name: tensor.clone() for name, tensor in start.items()})
    trainable = block.self_attn if isinstance(variant, Attention) else block.mlp
    trainable.requires_grad_(True)
    return _VariantTraining(block, recipe, start, loss, forward)


def _load(
    config: ModelConfig, parent: Mapping[str, Tensor], variant: Attention | Ffn, tensors: Tensors
) -> tuple[Block, Forward]:
    """Load the parent's block with one subblock replaced, frozen, and its forward pass.

    The forward pass of an FFN variant begins at the parent's hidden states behind attention.
    """
    if isinstance(variant, Attention):
        block = Block.load(config, variant, parent_ffn(config), {**tensors, **ffn_part(parent)})
        return block, _whole_forward(block)
    block = Block.load(config, parent_attention(config), variant, {**attention_part(parent), **tensors})
    return block, lambda _, attended, __: block.feed_forward(attended)


def _attended(parent_block: Block | None, hidden: Tensor, rotary: Rotary) -> Tensor:
    """Compute the parent's hidden states behind attention; without a parent block nothing reads them."""
    with torch.no_grad():
        return hidden if parent_block is None else parent_block.attend(hidden, rotary)


@dataclass(frozen=True)
class _HeldOut:
    """Batches for held-out losses, and the parent's block, from whose attention the FFN variants go on."""

    config: ModelConfig
    parent_block: Block | None
    batches: list[Batch]
    loss: Loss

    def losses(self, forwards: Mapping[K, Forward]) -> dict[K, float]:
        """Measure the mean loss of each forward pass over the batches."""
        totals = dict.fromkeys(forwards, 0.0)
        with torch.inference_mode():
            for hidden, target in self.batches if forwards else []:
                rotary = rotary_for(self.config, hidden.shape[1], hidden)
                attended = _attended(self.parent_block, hidden, rotary)
                for key, forward in forwards.items():
                    totals[key] += float(self.loss(forward(hidden, attended, rotary), target))
        return {key: total / len(self.batches) for key, total in totals.items()}


def _best(initial: Tensors, training: _VariantTraining, before: float, fitted: float, after: float) -> Trained:
    """Choose the weights with the lowest held-out loss.

    A comparison with nan is false, so a variant whose training diverged keeps the weights before it.
    """
    tensors, best = dict(training.kept), training.lowest_loss
    if after < best:
        tensors, best = training.tensors(), after
    if not best < before:
        return Trained(dict(initial), before, fitted, after, improved=False, steps=training.steps)
    return Trained(tensors, before, fitted, best, improved=True, steps=training.steps)
