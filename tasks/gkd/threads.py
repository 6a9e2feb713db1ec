"""Global distillation by threads of this process: the whole child with its masters and moments on one device.

A step adds up the gradients of its sequences in their order, however many workers computed them; then the workers take
a block each. A run that was killed goes on from its checkpoint and ends with the bytes of one that was not.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from statistics import fmean
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage.code_digest import code_digest
from storage.files import digest_of, write_whole
from storage.gkd import GkdCurve
from storage.json_records import as_record
from storage.params import Params
from storage.paths import Paths
from storage.pieces import Pieces
from storage.variants import Replacement
from tasks.gkd.course import Course, StepGradient, Watch
from tasks.gkd.material import CachedStates, LiveStates, Material, ParentStates, head_of, material_of
from tasks.puzzle.distill.gkd import Losses, LossWeights, TrainableChild, gradients, kl_to_parent, sick_part
from tasks.puzzle.distill.optimizer import MasterWeights, Schedule
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import prepare_compute

T = TypeVar("T")
_STATE = "state"


def train_in_threads(
    target: str, replacements: Sequence[Replacement], params: Params, paths: Paths, watch: Watch
) -> tuple[GkdCurve, Iterator[dict[str, Tensor]]]:
    """Train a child on `run.workers` threads.

    Returns the curve, and the best weights: tensors of each block, named as within a Llama layer.

    Raises:
        InputError: the training does not stay finite.
    """
    course = Course(target, params)
    material = material_of(course, replacements, params, paths)
    with ThreadPoolExecutor(params.run.workers) as pool:
        trainer = _ThreadTrainer(course, material, pool, params, paths)
        course.run(trainer, watch)
    return course.curve, trainer.best_blocks()


class _BlockInTraining:
    """A block of the child in training: its masters, and the float32 sum of a step's gradients.

    Blocks share nothing, so that workers take one each.

    Attributes:
        name: the block's name in the child.
        masters: the block's weights.
        parameters: the block's share of all parameters of the child, by their numbers.
        total: the sum of the gradients so far, in the order of the parameters.
    """

    def __init__(self, name: str, masters: MasterWeights, first: int) -> None:
        self.name, self.masters = name, masters
        self.parameters = slice(first, first + len(masters.narrow))
        self.total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in masters.narrow]

    def add(self, gradients_of_child: Sequence[list[Tensor]], share: float) -> None:
        """Add a share of sequences' gradients, in their order."""
        for of_sequence in gradients_of_child:
            torch._foreach_add_(self.total, of_sequence[self.parameters], alpha=share)

    def norm(self) -> Tensor:
        """Return the norm of the block's part of the gradient."""
        return torch.nn.utils.get_total_norm(self.total)

    def apply(self, scale: float) -> None:
        """Take the step with the gradient times `scale`, and begin another sum."""
        if scale != 1:
            torch._foreach_mul_(self.total, scale)
        self.masters.apply(self.total)
        torch._foreach_zero_(self.total)

    def state(self) -> dict[str, Tensor]:
        """Return masters and moments; `<kind>.<name>` of the block is `<kind>.<block>.<name>` here."""
        return {key.replace(".", f".{self.name}.", 1): tensor for key, tensor in self.masters.state().items()}

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue from the block's part of a checkpoint that was taken after `step` steps."""
        infix = f".{self.name}."
        block_state = {key.replace(infix, ".", 1): tensor for key, tensor in state.items() if infix in key}
        self.masters.restore(block_state, step)


class _ThreadTrainer:
    """A child in training on the threads of `pool`, and its checkpoints."""

    def __init__(self, course: Course, material: Material, pool: Executor, params: Params, paths: Paths) -> None:
        self._run, settings, self._pool, target = params.run, params.distill_child, pool, course.curve.target
        compute = prepare_compute(self._run.device, self._run.dtype, self._run.threads)
        variants, read = material.variants, material.refined.block
        blocks = [Block.load(material.config, *variant, read(i, *compute)) for i, variant in enumerate(variants)]
        self._child = TrainableChild(material.config, blocks, material.ends)
        self._head = head_of(paths, compute)
        self._weights_of_loss = LossWeights(settings.kl_weight, settings.cosine_weight)
        self._blocks = list(_in_training(self._child, course.schedule))
        self._best = self._weights()
        self._pieces = Pieces(paths.gkd_state(target), f"dvc repro distill_child@{target}")
        self._train: ParentStates
        if material.tokens is not None:
            self._train = LiveStates(material.tokens, material.first, compute, paths)
        else:
            self._train = CachedStates("train", material.boundaries, compute, paths)
        self._held_out = CachedStates("calibration", [0, self._child.last], compute, paths)
        code = code_digest("tasks.gkd.threads:_ThreadTrainer", "tasks.gkd.course:Course")
        self._key = digest_of([material.digest, code])

    def best_blocks(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of each block at the best measurement, named as within a Llama layer."""
        for index in range(len(self._child.layers)):
            prefix = f"layers.{index}."
            yield {name.removeprefix(prefix): tensor for name, tensor in self._best.items() if name.startswith(prefix)}

    def gradient(self, group: list[int]) -> StepGradient:
        """Add up the gradients of a step's sequences, as many at once as there are workers."""
        losses, at_once = list[Losses](), self._run.workers
        for start in range(0, len(group), at_once):
            computed = list(self._pool.map(self._gradients, group[start : start + at_once]))
            losses += [loss for _, loss in computed]
            summed = [of_sequence for of_sequence, _ in computed]
            self._of_blocks(partial(_BlockInTraining.add, gradients_of_child=summed, share=1 / len(group)))
        norm = float(torch.nn.utils.get_total_norm(self._of_blocks(_BlockInTraining.norm)))
        total = (gradient for block in self._blocks for gradient in block.total)
        names = (name for name, _ in self._child.named_parameters())
        sick = sick_part(losses, norm, zip(names, total, strict=True))
        terms = ([loss.kl for loss in losses], [loss.cosine for loss in losses], [loss.total for loss in losses])
        return StepGradient(Losses(*map(fmean, terms)), norm, sick)

    def apply(self, scale: float) -> None:
        """Take the step, a block on each worker."""
        self._of_blocks(partial(_BlockInTraining.apply, scale=scale))

    def _of_blocks(self, work: Callable[[_BlockInTraining], T]) -> list[T]:
        """Call `work` for every block on the workers' threads, and return the results in the blocks' order."""

        def on_thread(block: _BlockInTraining) -> T:
            self._prepare_thread()
            return work(block)

        return list(self._pool.map(on_thread, self._blocks))

    def _prepare_thread(self) -> None:
        prepare_compute(self._run.device, self._run.dtype, self._run.threads)

    def _gradients(self, sequence: int) -> tuple[list[Tensor], Losses]:
        """Compute gradients and losses of one sequence; runs on a worker's thread."""
        self._prepare_thread()
        return gradients(self._child, self._train.of([sequence]), self._head, self._weights_of_loss)

    def held_out_kl(self, sequences: range) -> float:
        """Measure the mean KL of held-out sequences, one on each worker."""

        def sequence_kl(sequence: int) -> float:
            self._prepare_thread()
            return kl_to_parent(self._child, self._held_out.of([sequence]), self._head)

        return fmean(self._pool.map(sequence_kl, sequences))

    def keep(self) -> None:
        """Remember the present weights as the best so far."""
        self._best = self._weights()

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._child.named_parameters()}

    def agree(self, is_due: bool) -> bool:
        """Return what this process, the only one, says."""
        return is_due

    def save(self, curve: GkdCurve) -> None:
        """Write masters, moments and the best weights, then their record; the earlier checkpoint is deleted last."""
        path = self._pieces.folder / f"state_{len(curve.steps):06d}.safetensors"
        best = {f"best.{name}": tensor for name, tensor in self._best.items()}
        with write_whole(path) as temporary:
            save_file(
                dict(itertools.chain(best.items(), *(block.state().items() for block in self._blocks))), temporary
            )
        self._pieces.finish(_STATE, self._key, [path], asdict(curve))
        self._pieces.keep_only({_STATE: self._key})

    def resume(self) -> GkdCurve | None:
        """Go on from the last checkpoint of this very training, if there is one; delete those of others."""
        if self._pieces.keep_only({_STATE: self._key}):
            return None
        record = self._pieces.get(_STATE)
        curve = as_record(record["facts"], GkdCurve, str(self._pieces.folder), self._pieces.rebuild)
        (name,) = record["files"]
        state = load_file(self._pieces.folder / name)
        self._best = {key: state[f"best.{key}"] for key in self._best}  # in the order of an uninterrupted run
        for block in self._blocks:
            block.restore(state, len(curve.steps))
        return curve


def _in_training(child: TrainableChild, schedule: Schedule) -> Iterator[_BlockInTraining]:
    """Yield the blocks that train; one without both subblocks has no weights."""
    first = 0
    for name, block in child.layers.named_children():
        if [*block.parameters()]:
            in_training = _BlockInTraining(f"layers.{name}", MasterWeights(block, schedule), first)
            first = in_training.parameters.stop
            yield in_training
