"""distill_child: the corrected child + the parent's states -> children/<target>/distilled/ and gkd.json (GKD).

It trains on the train sequences behind those that BLD used, each once. The parent's hidden states come from the
activation cache, and the cosine loss is taken at the boundaries that it keeps; or from the parent itself
(tasks/tensors/teacher.py), at all of them. A step adds up the gradients of its sequences in their order, however many
workers computed them; then the workers take a block each. Every few steps the held-out KL is measured, and where it is
due masters, moments, position and the best weights so far go to a checkpoint; a run that was killed goes on from it and
ends with the bytes of one that was not. A loss or a gradient that is not finite ends the run before any weight changes.
"""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import TypeVar

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from storage.activations import REBUILD, BoundaryReader, shard_name
from storage.checkpoints import Checkpoint, read_blocks
from storage.code_digest import code_digest
from storage.files import InputError, digest_of, write_whole
from storage.gkd import GkdCurve, GkdStep, HeldOutKl, write_gkd
from storage.json_records import as_record
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces
from storage.variants import Replacement
from tasks.checkpoints.children import architecture_for, publish
from tasks.puzzle.distill.extrapolation import longer_training
from tasks.puzzle.distill.gkd import (
    Losses,
    LossWeights,
    States,
    Teacher,
    TrainableChild,
    gradients,
    kl_to_parent,
    sick_part,
)
from tasks.puzzle.distill.optimizer import MasterWeights, Schedule
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.model.head import Head
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tasks.tensors.activations import read_tokens
from tasks.tensors.teacher import teacher_is_live, tokens_before_gkd

T = TypeVar("T")
_STATE = "state"
_SHORT_SAVE = 1.0
_MOST_SAVING = 0.1
"""Share of the time that goes to checkpoints, where one takes longer than a short save."""
_LONGER = 10
"""The multiple of the tokens for which gkd.json says what to expect."""


@dataclass(frozen=True)
class Measurement:
    """The training at a held-out measurement, for people who watch: KL in nats/token, loss and norm of the last step.

    The speed is that of this process, measurements included.
    """

    step: int
    num_steps: int
    kl: float
    loss: float
    gradient_norm: float
    tokens_per_s: float
    seconds_left: float


Watch = Callable[[Measurement], None]
"""What is called at every held-out measurement behind a step."""


def _unwatched(_: Measurement) -> None:
    """Show nothing."""


@task(cache_policy=NO_CACHE)
def distill(target: str, params: Params, paths: Paths, watch: Watch = _unwatched) -> None:
    """Train the child of `target` and publish its best weights.

    Raises:
        InputError: the child was assembled for another parent, or the training does not stay finite.
    """
    parent = Parent(paths.parent)
    chosen = architecture_for(parent, target, paths)
    training = _Training(target, chosen.blocks, params, paths)
    training.run(watch)
    curve = training.curve
    corrected = "corrected in closed form, " if params.refine_child.tokens else ""
    sentence = (
        f"Weights: assembled from blockwise distilled variants, {corrected}then globally distilled (GKD) on "
        f"{curve.best.tokens:,} tokens; held-out KL {curve.held_out[0].kl:.3f} before, {curve.best.kl:.3f} after "
        "(nats/token)."
    )
    max_shard_gib = params.assemble_child.max_shard_gib
    publish(paths.distilled(target), chosen, parent, training.best_blocks(), sentence, max_shard_gib)
    measured = [(measurement.tokens, measurement.kl) for measurement in curve.held_out]
    write_gkd(paths.gkd(target), replace(curve, modelled=longer_training(measured, _LONGER)))
    shutil.rmtree(paths.gkd_state(target))


class _CachedStates:
    """The parent's hidden states of a split's sequences, read from the activation cache."""

    def __init__(self, split: str, boundaries: Sequence[int], compute: Compute, paths: Paths) -> None:
        self._compute = compute
        self._readers = {boundary: BoundaryReader(paths.activations, split, boundary) for boundary in boundaries}

    def of(self, sequence: int) -> States:
        """Return a function that reads a boundary of a sequence."""
        return lambda boundary: self._readers[boundary].read([sequence]).to(*self._compute)

    def digest(self, sequences: range) -> list[list[str]]:
        """Return the checksums of all files that hold these sequences."""
        return [reader.digest(sequences.start, sequences.stop) for reader in self._readers.values()]


class _LiveStates:
    """The parent's hidden states of train sequences, computed when they are asked for."""

    def __init__(self, sequences: range, compute: Compute, paths: Paths) -> None:
        self._parent, self._first = Parent(paths.parent), sequences.start
        self._tokens, config = read_tokens(paths, "train", sequences), self._parent.config
        variants = parent_attention(config), parent_ffn(config)
        blocks = [Block.load(config, *variants, self._parent.block(i, *compute)) for i in range(config.num_blocks)]
        embedding, _, _ = self._parent.outside(*compute)
        self._teacher = Teacher(config, embedding, blocks)

    def of(self, sequence: int) -> States:
        """Compute all boundaries of a sequence."""
        return self._teacher.states(self._tokens[sequence - self._first][None])

    def digest(self, _: range) -> list[list[str]]:
        """Return the digests of the parent and of all tokens."""
        return [[self._parent.digest, digest_of(self._tokens.numpy().tobytes().hex())]]


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


class _Training:
    """A child in training, the curve so far, and the checkpoints of both."""

    def __init__(self, target: str, replacements: Sequence[Replacement], params: Params, paths: Paths) -> None:
        run, settings, self._params, parent = params.run, params.distill_child, params, Parent(paths.parent)
        compute = prepare_compute(run.device, run.dtype, run.threads)
        refined = Checkpoint(paths.refined(target), f"dvc repro refine_child@{target}")
        config, variants = read_blocks(refined)
        blocks = [Block.load(config, *variant, refined.block(i, *compute)) for i, variant in enumerate(variants)]
        is_live, ends = teacher_is_live(params, parent.config), [block.parent_blocks.stop for block in replacements]
        stored_boundaries = (
            ends
            if is_live
            else Pieces(paths.activations, REBUILD).get(shard_name("train", 0))["facts"]["stored_boundaries"]
        )
        self._child = TrainableChild(config, blocks, [end if end in stored_boundaries else None for end in ends])
        _, norm, lm_head = parent.outside(*compute)
        self._head = Head(norm, lm_head, config.rms_norm_eps)
        self._groups = _steps(params)
        schedule = Schedule(len(self._groups), settings.learning_rate, settings.warmup, settings.weight_decay)
        first, self._blocks = 0, list[_BlockInTraining]()
        for name, block in self._child.layers.named_children():
            if [*block.parameters()]:  # a block without both subblocks has none
                self._blocks.append(_BlockInTraining(f"layers.{name}", MasterWeights(block, schedule), first))
                first = self._blocks[-1].parameters.stop
        self._best = self._weights()
        self._pieces = Pieces(paths.gkd_state(target), f"dvc repro distill_child@{target}")
        trained = [sequence for group in self._groups for sequence in group]
        sequences = range(min(trained), max(trained) + 1)
        boundaries = [0, *(end for end in self._child.ends if end is not None)]
        self._train: _LiveStates | _CachedStates
        if is_live:
            self._train = _LiveStates(sequences, compute, paths)
        else:
            self._train = _CachedStates("train", boundaries, compute, paths)
        self._held_out = _CachedStates("calibration", [0, self._child.last], compute, paths)
        self._key = digest_of(
            {
                "settings": settings.model_dump(exclude={"teacher"}),
                "run": run.model_dump(exclude={"workers"}),
                "child": refined.checksums,
                "train": self._train.digest(sequences),
                "held_out": self._held_out.digest(_held_out(params)),
                "steps": self._groups,
                "code": code_digest("tasks.distill_child:_Training"),
            }
        )
        self.curve = GkdCurve(target, (), (), 0)
        self._saved_at, self._saving_seconds = time.monotonic(), 0.0

    def run(self, watch: Watch) -> None:
        """Train to the end, from the last checkpoint or from the start.

        Raises:
            InputError: a loss or a gradient is not finite.
        """
        self._resume()
        every, total, first = self._params.distill_child.checkpoint_steps, len(self._groups), len(self.curve.steps)
        with ThreadPoolExecutor(self._params.run.workers) as pool:
            if not self.curve.held_out:
                self._measure(pool)
            began = time.monotonic()
            progress = tqdm(total=total, desc="distill", unit="step", initial=first, disable=None)
            for group in self._groups[first:]:
                if self._has_stalled:
                    break
                self._step(pool, group)
                progress.update()
                done = len(self.curve.steps)
                if done % every == 0 or done == total:
                    self._measure(pool)
                    progress.set_postfix(kl=f"{self.curve.held_out[-1].kl:.3f}")
                    if _is_due(time.monotonic() - self._saved_at, self._saving_seconds):
                        self._save()
                    watch(self._measurement((time.monotonic() - began) / (done - first)))
            progress.close()

    @property
    def _has_stalled(self) -> bool:
        """Tell whether the last measurements brought no new lowest KL, as many as params call enough."""
        since_best = sum(measurement.step > self.curve.best_step for measurement in self.curve.held_out)
        return 0 < self._params.distill_child.patience <= since_best

    def _measurement(self, step_seconds: float) -> Measurement:
        last, num_steps = self.curve.steps[-1], len(self._groups)
        return Measurement(
            step=last.step,
            num_steps=num_steps,
            kl=self.curve.held_out[-1].kl,
            loss=last.loss,
            gradient_norm=last.gradient_norm,
            tokens_per_s=last.tokens / last.step / step_seconds,
            seconds_left=0.0 if self._has_stalled else step_seconds * (num_steps - last.step),
        )

    def best_blocks(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of each block at the best measurement, named as within a Llama layer."""
        for index in range(len(self._child.layers)):
            prefix = f"layers.{index}."
            yield {name.removeprefix(prefix): tensor for name, tensor in self._best.items() if name.startswith(prefix)}

    def _step(self, pool: Executor, group: list[int]) -> None:
        settings, rate, number = self._params.distill_child, self._blocks[0].masters.rate, len(self.curve.steps) + 1
        losses = list[Losses]()
        at_once = self._params.run.workers
        for start in range(0, len(group), at_once):
            computed = list(pool.map(self._gradients, group[start : start + at_once]))
            losses += [loss for _, loss in computed]
            summed = [of_sequence for of_sequence, _ in computed]
            self._of_blocks(pool, partial(_BlockInTraining.add, gradients_of_child=summed, share=1 / len(group)))
        norm = float(torch.nn.utils.get_total_norm(self._of_blocks(pool, _BlockInTraining.norm)))
        total = (gradient for block in self._blocks for gradient in block.total)
        names = (name for name, _ in self._child.named_parameters())
        if sick := sick_part(losses, norm, zip(names, total, strict=True)):
            if self.curve.steps:
                self._save()
            self._stop(number, sick)
        scale = settings.clip_norm / norm if norm > settings.clip_norm else 1.0
        self._of_blocks(pool, partial(_BlockInTraining.apply, scale=scale))
        step = GkdStep(
            step=number,
            tokens=number * len(group) * self._params.prepare_corpus.seq_len,
            loss=fmean(loss.total for loss in losses),
            kl=fmean(loss.kl for loss in losses),
            cosine=fmean(loss.cosine for loss in losses),
            learning_rate=rate,
            gradient_norm=norm,
        )
        self.curve = replace(self.curve, steps=(*self.curve.steps, step))

    def _of_blocks(self, pool: Executor, work: Callable[[_BlockInTraining], T]) -> list[T]:
        """Call `work` for every block on the workers' threads, and return the results in the blocks' order."""
        run = self._params.run

        def on_thread(block: _BlockInTraining) -> T:
            prepare_compute(run.device, run.dtype, run.threads)
            return work(block)

        return list(pool.map(on_thread, self._blocks))

    def _stop(self, step: int, sick: str) -> None:
        """End a training that is not finite.

        Raises:
            InputError: always.
        """
        settings, target = self._params.distill_child, self.curve.target
        raise InputError(
            f"distill_child@{target} stopped at step {step} of {len(self._groups)}: {sick}; lower "
            f"distill_child.learning_rate ({settings.learning_rate:g}) or, with run.dtype bfloat16, set float32, and "
            f"run `dvc repro distill_child@{target}` (an earlier child stays)"
        )

    def _gradients(self, sequence: int) -> tuple[list[Tensor], Losses]:
        """Compute gradients and losses of one sequence; runs on a worker's thread."""
        settings, run = self._params.distill_child, self._params.run
        prepare_compute(run.device, run.dtype, run.threads)
        weights = LossWeights(settings.kl_weight, settings.cosine_weight)
        return gradients(self._child, self._train.of(sequence), self._head, weights)

    def _measure(self, pool: Executor) -> None:
        """Measure the held-out KL, and keep the weights if it is the lowest so far."""
        run, settings, seq_len = self._params.run, self._params.distill_child, self._params.prepare_corpus.seq_len

        def sequence_kl(sequence: int) -> float:
            prepare_compute(run.device, run.dtype, run.threads)
            return kl_to_parent(self._child, self._held_out.of(sequence), self._head)

        kl, done = fmean(pool.map(sequence_kl, _held_out(self._params))), len(self.curve.steps)
        if not math.isfinite(kl):
            self._stop(done, f"the held-out KL behind it is {kl}")
        is_best = not self.curve.held_out or kl < self.curve.best.kl
        if is_best:
            self._best = self._weights()
        measurement = HeldOutKl(done, done * settings.sequences_per_step * seq_len, kl)
        self.curve = replace(
            self.curve,
            held_out=(*self.curve.held_out, measurement),
            best_step=done if is_best else self.curve.best_step,
        )

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._child.named_parameters()}

    def _save(self) -> None:
        """Write a checkpoint: the tensors, then their record; the earlier checkpoint is deleted last."""
        began = time.monotonic()
        path = self._pieces.folder / f"state_{len(self.curve.steps):06d}.safetensors"
        best = {f"best.{name}": tensor for name, tensor in self._best.items()}
        with write_whole(path) as temporary:
            save_file(
                dict(itertools.chain(best.items(), *(block.state().items() for block in self._blocks))), temporary
            )
        self._pieces.finish(_STATE, self._key, [path], asdict(self.curve))
        self._pieces.keep_only({_STATE: self._key})
        self._saved_at = time.monotonic()
        self._saving_seconds = self._saved_at - began

    def _resume(self) -> None:
        """Go on from the last checkpoint of this very training, if there is one; delete those of others."""
        if self._pieces.keep_only({_STATE: self._key}):
            return
        record = self._pieces.get(_STATE)
        self.curve = as_record(record["facts"], GkdCurve, str(self._pieces.folder), self._pieces.rebuild)
        (name,) = record["files"]
        state = load_file(self._pieces.folder / name)
        self._best = {key: state[f"best.{key}"] for key in self._best}  # in the order of an uninterrupted run
        for block in self._blocks:
            block.restore(state, len(self.curve.steps))


def _is_due(since_last: float, saving: float) -> bool:
    """Tell whether a checkpoint is worth its seconds: `since_last` of training would be lost, `saving` goes to it."""
    return saving < _SHORT_SAVE or since_last >= saving / _MOST_SAVING


def _steps(params: Params) -> list[list[int]]:
    """Train sequences of each step: those behind BLD's and the correction's, in a seeded order, each used once."""
    settings, seq_len = params.distill_child, params.prepare_corpus.seq_len
    first = tokens_before_gkd(params) // seq_len
    generator = torch.Generator().manual_seed(params.run.seed)
    order = (first + torch.randperm(settings.tokens // seq_len, generator=generator)).tolist()
    size = settings.sequences_per_step
    return [order[start : start + size] for start in range(0, len(order), size)]


def _held_out(params: Params) -> range:
    """Return the calibration sequences of the held-out KL: the end of the split, as in BLD."""
    seq_len, stop = params.prepare_corpus.seq_len, params.prepare_corpus.calibration_tokens
    return range((stop - params.distill_child.held_out_tokens) // seq_len, stop // seq_len)
