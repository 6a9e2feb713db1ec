"""Blockwise local distillation (BLD), decoupled: all variants of one block from one pass over its activations.

In: a parent block's tensors, hidden states at its two boundaries. Out: trained tensors of every variant with the
losses before and after. The child is fed with the parent's activations (METHOD.md, BLD; arXiv 2411.19146, 3.2). The
attention variant trains with the parent's FFN frozen, the FFN variant with the parent's attention frozen, so the
parent's attention output is computed once for all FFN variants. Norms stay the parent's: their weight is a diagonal
factor of the matrices that follow, which train.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from storage.model_config import ModelConfig
from storage.records import Attention, Ffn
from tasks.puzzle.blocks import Block, GatedFfn
from tasks.puzzle.initialise import Tensors, attention_part, channel_contribution, channel_order, ffn_part
from tasks.puzzle.losses import Loss, normalised_mse
from tasks.puzzle.optimizer import MasterWeights, Schedule
from tasks.puzzle.rotary import Rotary, rotary_for
from tasks.puzzle.variants import parent_attention, parent_ffn

K = TypeVar("K", bound=Hashable)
Batch = tuple[Tensor, Tensor]  # input and target, each [sequences, tokens, hidden]


@dataclass(frozen=True)
class Trained:
    """A variant after BLD: whichever of initial weights, closed-form start and trained weights has the lowest loss.

    Held-out losses, of the kind that was trained: `loss_before` of the initial weights, `loss_fitted` of the
    closed-form start (steps begin with the better of the two), `loss_after` of what is kept. Where training did not
    help, `improved` is False, the initial weights stay and `loss_after` is what the training came to. `steps` were
    taken until it ended or stopped early.
    """

    tensors: Tensors
    loss_before: float
    loss_fitted: float
    loss_after: float
    improved: bool
    steps: int


@dataclass(frozen=True)
class Recipe:
    """How a variant is trained: steps and learning rate, and when to stop early.

    Every `check_steps` steps (0: never) the held-out loss is taken; after `patience` checks in a row without a new
    lowest one the variant stops. The weights of the lowest are kept.
    """

    schedule: Schedule
    check_steps: int = 0
    patience: int = 1


def rank_channels(config: ModelConfig, parent: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> Tensor:
    """FFN channels of a parent block from the most to the least important, over `inputs` at its input boundary."""
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


Run = Callable[[Tensor, Tensor, Rotary], Tensor]
"""(block input, parent's hidden states after attention, rotary) -> the block's output."""


@dataclass
class _Student:
    """One variant in training: how it runs, steps so far, and the weights with the lowest loss, at first its start."""

    block: Block
    recipe: Recipe
    kept: Tensors
    lowest: float
    run: Run
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
        if loss < self.lowest:
            self.lowest, self.kept, self.checks_since = loss, self.tensors(), 0


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
        fitted: another start for each: least_squares.fit_outputs, or `starts` again.
        batches: training batches in order, one per step, as many as the longest schedule has.
        held_out: batches for the held-out losses.
        recipes: how each is trained.
        loss: what is lowered, and measured on held-out batches.

    Returns:
        For each variant the weights to keep. Each variant's bytes are independent of which others train beside it.
    """
    teacher = Block.load(config, parent_attention(config), parent_ffn(config), parent)
    held = _HeldOut(config, teacher, list(held_out), loss)
    before, between = (
        held.losses({v: _runner(config, parent, v, own)[1] for v, own in of.items()}) for of in (starts, fitted)
    )
    students = {}
    for variant, start in starts.items():
        better, lowest = start, before[variant]
        if between[variant] < lowest:
            better, lowest = fitted[variant], between[variant]
        students[variant] = _student(config, parent, variant, better, lowest, recipes[variant])
    _train(students, batches, held)
    after = held.losses({variant: student.run for variant, student in students.items()})
    return {
        variant: _best(start, students[variant], before[variant], between[variant], after[variant])
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
        blocks: tensors of the parent's blocks that it stands for. It starts as the one that alone comes closest.
        batches: training batches in order: hidden states before the first block and behind the last one.
        held_out: the same for the held-out losses.
        recipe: how it is trained.
        loss: what is lowered, and measured on held-out batches.

    Returns:
        The block, and the index in `blocks` of its start.
    """
    kind = parent_attention(config), parent_ffn(config)
    held = _HeldOut(config, None, list(held_out), loss)

    def runner(tensors: Mapping[str, Tensor]) -> Block:
        return Block.load(config, *kind, tensors)

    alone = held.losses({index: _alone(runner(of)) for index, of in enumerate(blocks)})
    start = min(alone, key=lambda index: (alone[index], index))
    own = dict(blocks[start])
    block = runner({name: tensor.clone() for name, tensor in own.items()})
    block.self_attn.requires_grad_(True)
    block.mlp.requires_grad_(True)
    student = _Student(block, recipe, own, alone[start], _alone(block))
    _train({start: student}, batches, held)
    after = held.losses({start: student.run})[start]
    return _best(own, student, alone[start], alone[start], after), start


def _alone(block: Block) -> Run:
    return lambda hidden, _, rotary: block(hidden, rotary)


def _train(students: Mapping[K, _Student], batches: Iterable[Batch], held_out: "_HeldOut") -> None:
    """One step of every student per batch; what they share, the teacher's attention, is computed once."""
    config, teacher = held_out.config, held_out.teacher
    for hidden, target in batches:
        rotary = rotary_for(config, hidden.shape[1], hidden)
        attended = _attended(teacher, hidden, rotary)
        training = {key: student for key, student in students.items() if not student.has_ended}
        for student in training.values():
            torch.autograd.backward(held_out.loss(student.run(hidden, attended, rotary), target))
            student.masters.step()
            student.steps += 1
        due = {key: student.run for key, student in training.items() if student.is_due}
        for key, loss_now in held_out.losses(due).items():
            students[key].check(loss_now)
        if all(student.has_ended for student in students.values()):
            return


def _student(
    config: ModelConfig,
    parent: Mapping[str, Tensor],
    variant: Attention | Ffn,
    start: Tensors,
    loss: float,
    recipe: Recipe,
) -> _Student:
    block, run = _runner(config, parent, variant, {name: tensor.clone() for name, tensor in start.items()})
    trainable = block.self_attn if isinstance(variant, Attention) else block.mlp
    trainable.requires_grad_(True)
    return _Student(block, recipe, start, loss, run)


def _runner(
    config: ModelConfig, parent: Mapping[str, Tensor], variant: Attention | Ffn, own: Tensors
) -> tuple[Block, Run]:
    """A block with one half replaced, frozen, and how it runs: an FFN variant takes the parent's attention as given."""
    if isinstance(variant, Attention):
        whole = Block.load(config, variant, parent_ffn(config), {**own, **ffn_part(parent)})
        return whole, _alone(whole)
    half = Block.load(config, parent_attention(config), variant, {**attention_part(parent), **own})
    return half, lambda _, attended, __: half.feed_forward(attended)


def _attended(teacher: Block | None, hidden: Tensor, rotary: Rotary) -> Tensor:
    """The teacher's hidden states after attention; without a teacher nobody reads them."""
    with torch.no_grad():
        return hidden if teacher is None else teacher.attend(hidden, rotary)


@dataclass(frozen=True)
class _HeldOut:
    """Batches for held-out losses, and the teacher whose attention the FFN variants take."""

    config: ModelConfig
    teacher: Block | None
    batches: list[Batch]
    loss: Loss

    def losses(self, runs: Mapping[K, Run]) -> dict[K, float]:
        """Mean loss of each variant."""
        totals = dict.fromkeys(runs, 0.0)
        with torch.inference_mode():
            for hidden, target in self.batches if runs else []:
                rotary = rotary_for(self.config, hidden.shape[1], hidden)
                attended = _attended(self.teacher, hidden, rotary)
                for variant, run in runs.items():
                    totals[variant] += float(self.loss(run(hidden, attended, rotary), target))
        return {variant: total / len(self.batches) for variant, total in totals.items()}


def _best(initial: Tensors, student: _Student, before: float, fitted: float, after: float) -> Trained:
    """The weights with the lowest held-out loss; nan is lower than nothing, so a variant that diverged falls back."""
    tensors, best = dict(student.kept), student.lowest
    if after < best:
        tensors, best = student.tensors(), after
    if not best < before:
        return Trained(dict(initial), before, fitted, after, improved=False, steps=student.steps)
    return Trained(tensors, before, fitted, best, improved=True, steps=student.steps)
