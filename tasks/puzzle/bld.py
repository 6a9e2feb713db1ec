"""Blockwise local distillation (BLD), decoupled: all variants of one block from one pass over its activations.

In: a parent block's tensors, hidden states at its two boundaries. Out: trained tensors of every variant with the
losses before and after. Loss (METHOD.md, BLD; arXiv 2411.19146, 3.2): MSE(child_out, parent_out) / mean(parent_out^2),
the child fed with the parent's activations. The attention variant trains with the parent's FFN frozen, the FFN variant
with the parent's attention frozen, so the parent's attention output is computed once for all FFN variants. Norms stay
the parent's: their weight is a diagonal factor of the matrices that follow, which train.
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
from tasks.puzzle.optimizer import MasterWeights, Schedule
from tasks.puzzle.rotary import Rotary, rotary_for
from tasks.puzzle.variants import parent_attention, parent_ffn

K = TypeVar("K", bound=Hashable)
Batch = tuple[Tensor, Tensor]  # input and target, each [sequences, tokens, hidden]


@dataclass(frozen=True)
class Trained:
    """A variant after BLD: whichever of initial weights, closed-form start and trained weights has the lowest loss.

    Held-out losses: `loss_before` of the initial weights, `loss_fitted` of the closed-form start (steps begin with the
    better of the two), `loss_after` of what is kept. Where training did not help, `improved` is False, the initial
    weights stay and `loss_after` is what the training came to.
    """

    tensors: Tensors
    loss_before: float
    loss_fitted: float
    loss_after: float
    improved: bool


def normalised_mse(output: Tensor, target: Tensor) -> Tensor:
    """mean((output - target)^2) / mean(target^2) in float32 (METHOD.md, BLD), a scalar."""
    wide = target.float()
    return (output.float() - wide).square().mean() / wide.square().mean()


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


@dataclass(frozen=True)
class _Student:
    """One variant in training."""

    block: Block
    masters: MasterWeights
    start: Tensors
    run: Run

    def tensors(self) -> Tensors:
        return {name: self.block.state_dict()[name].clone() for name in self.start}


def distill_block(
    config: ModelConfig,
    parent: Mapping[str, Tensor],
    starts: Mapping[Attention | Ffn, Tensors],
    fitted: Mapping[Attention | Ffn, Tensors],
    batches: Iterable[Batch],
    held_out: Iterable[Batch],
    schedule: Schedule,
) -> dict[Attention | Ffn, Trained]:
    """Train every variant of one block.

    Args:
        config: geometry of the parent.
        parent: tensors of the parent's block (a span's whole block), in the dtype of compute.
        starts: initial tensors of each variant to train (its own subblock only).
        fitted: another start for each: least_squares.fit_outputs, or `starts` again.
        batches: training batches in order, one per step.
        held_out: batches for the held-out losses; read three times.
        schedule: steps and learning rate.

    Returns:
        For each variant the weights to keep. Each variant's bytes are independent of which others train beside it.
    """
    teacher = Block.load(config, parent_attention(config), parent_ffn(config), parent)
    held = list(held_out)
    before, between = (
        _losses(config, teacher, {v: _runner(config, parent, v, own)[1] for v, own in of.items()}, held)
        for of in (starts, fitted)
    )
    students = {
        variant: _student(
            config, parent, variant, fitted[variant] if between[variant] < before[variant] else start, schedule
        )
        for variant, start in starts.items()
    }
    runs = {variant: student.run for variant, student in students.items()}
    _train(config, teacher, list(students.values()), batches)
    after = _losses(config, teacher, runs, held)
    return {
        variant: _best(start, students[variant], before[variant], between[variant], after[variant])
        for variant, start in starts.items()
    }


def distill_whole(
    config: ModelConfig,
    blocks: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Batch],
    held_out: Iterable[Batch],
    schedule: Schedule,
) -> tuple[Trained, int]:
    """Train one block in place of several, both subblocks together.

    Args:
        config: geometry of the parent.
        blocks: tensors of the parent's blocks that it stands for. It starts as the one that alone comes closest.
        batches: training batches in order: hidden states before the first block and behind the last one.
        held_out: the same for the held-out losses.
        schedule: steps and learning rate.

    Returns:
        The block, and the index in `blocks` of its start.
    """
    kind, held = (parent_attention(config), parent_ffn(config)), list(held_out)

    def runner(tensors: Mapping[str, Tensor]) -> Block:
        return Block.load(config, *kind, tensors)

    alone = _losses(config, None, {index: _alone(runner(of)) for index, of in enumerate(blocks)}, held)
    start = min(alone, key=lambda index: (alone[index], index))
    own = dict(blocks[start])
    block = runner({name: tensor.clone() for name, tensor in own.items()})
    block.self_attn.requires_grad_(True)
    block.mlp.requires_grad_(True)
    student = _Student(block, MasterWeights(block, schedule), own, _alone(block))
    _train(config, None, [student], batches)
    after = _losses(config, None, {start: student.run}, held)[start]
    return _best(own, student, alone[start], alone[start], after), start


def _alone(block: Block) -> Run:
    return lambda hidden, _, rotary: block(hidden, rotary)


def _train(config: ModelConfig, teacher: Block | None, students: Sequence[_Student], batches: Iterable[Batch]) -> None:
    """One step of every student per batch; what they share, the teacher's attention, is computed once."""
    for hidden, target in batches:
        rotary = rotary_for(config, hidden.shape[1], hidden)
        attended = _attended(teacher, hidden, rotary)
        for student in students:
            loss = normalised_mse(student.run(hidden, attended, rotary), target)
            torch.autograd.backward(loss)
            student.masters.step()


def _student(
    config: ModelConfig, parent: Mapping[str, Tensor], variant: Attention | Ffn, start: Tensors, schedule: Schedule
) -> _Student:
    block, run = _runner(config, parent, variant, {name: tensor.clone() for name, tensor in start.items()})
    trainable = block.self_attn if isinstance(variant, Attention) else block.mlp
    trainable.requires_grad_(True)
    return _Student(block, MasterWeights(block, schedule), start, run)


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


def _losses(config: ModelConfig, teacher: Block | None, runs: Mapping[K, Run], held_out: list[Batch]) -> dict[K, float]:
    """Mean held-out loss of each variant."""
    totals = dict.fromkeys(runs, 0.0)
    with torch.inference_mode():
        for hidden, target in held_out:
            rotary = rotary_for(config, hidden.shape[1], hidden)
            attended = _attended(teacher, hidden, rotary)
            for variant, run in runs.items():
                totals[variant] += float(normalised_mse(run(hidden, attended, rotary), target))
    return {variant: total / len(held_out) for variant, total in totals.items()}


def _best(initial: Tensors, student: _Student, before: float, fitted: float, after: float) -> Trained:
    """The weights with the lowest held-out loss; nan is lower than nothing, so a variant that diverged falls back."""
    tensors, best = dict(initial), before
    if fitted < best:
        tensors, best = dict(student.start), fitted
    if after < best:
        tensors, best = student.tensors(), after
    improved = best < before
    return Trained(tensors, before, fitted, best if improved else after, improved)
