"""distill_child: the assembled child + cached activations -> children/<target>/distilled/ and gkd.json (GKD).

Targets come from the activation cache: the train sequences behind those that BLD used, each once; the cosine loss is
taken at the boundaries that it keeps (rolling mode: the last one and those that params name). A step adds up the
gradients of its sequences in their order, however many workers computed them. Every few steps the held-out KL is
measured, and masters, moments, position and the best weights so far go to a checkpoint; a run that was killed goes on
from it and ends with the bytes of one that was not.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, replace
from statistics import fmean

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from storage.activations import REBUILD, BoundaryReader, shard_name
from storage.checkpoints import Checkpoint, read_blocks
from storage.code_digest import code_digest
from storage.files import digest_of, write_whole
from storage.gkd import GkdCurve, GkdStep, HeldOutKl, write_gkd
from storage.json_records import as_record
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces
from storage.variants import Replacement
from tasks.checkpoints.children import architecture_for, publish
from tasks.puzzle.distill.gkd import Losses, LossWeights, States, TrainableChild, gradients, kl_to_parent
from tasks.puzzle.distill.optimizer import MasterWeights, Schedule
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.model.head import Head

_STATE = "state"


@task(cache_policy=NO_CACHE)
def distill(target: str, params: Params, paths: Paths) -> None:
    """Train the child of `target` and publish its best weights.

    Raises:
        InputError: the child was assembled for another parent.
    """
    parent, settings = Parent(paths.parent), params.distill_child
    chosen = architecture_for(parent, target, paths)
    training = _Training(target, chosen.blocks, params, paths)
    training.run()
    curve = training.curve
    sentence = (
        f"Weights: assembled from blockwise distilled variants, then globally distilled (GKD) on {settings.tokens:,} "
        f"tokens; held-out KL {curve.held_out[0].kl:.3f} before, {curve.best.kl:.3f} after (nats/token)."
    )
    max_shard_gib = params.assemble_child.max_shard_gib
    publish(paths.distilled(target), chosen, parent, training.best_blocks(), sentence, max_shard_gib)
    write_gkd(paths.gkd(target), curve)
    shutil.rmtree(paths.gkd_state(target))


class _Training:
    """A child in training, the curve so far, and the checkpoints of both."""

    def __init__(self, target: str, replacements: Sequence[Replacement], params: Params, paths: Paths) -> None:
        run, self._params, self._paths = params.run, params, paths
        compute, parent = prepare_compute(run.device, run.dtype, run.threads), Parent(paths.parent)
        assembled = Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
        config, variants = read_blocks(assembled)
        blocks = [Block.load(config, *variant, assembled.block(i, *compute)) for i, variant in enumerate(variants)]
        kept = Pieces(paths.activations, REBUILD).get(shard_name("train", 0))["facts"]["kept"]
        ends = [replacement.parent_blocks.stop for replacement in replacements]
        self._child = TrainableChild(config, blocks, [end if end in kept else None for end in ends])
        _, norm, lm_head = parent.outside(*compute)
        self._head = Head(norm, lm_head, config.rms_norm_eps)
        self._groups = _steps(params)
        settings = params.distill_child
        schedule = Schedule(len(self._groups), settings.learning_rate, settings.warmup, settings.weight_decay)
        self._masters = MasterWeights(self._child, schedule)
        self._best = self._weights()
        self._pieces = Pieces(paths.gkd_state(target), f"dvc repro distill_child@{target}")
        boundaries = [0, *(end for end in self._child.ends if end is not None)]
        self._readers = {}
        for split, boundary in itertools.product(("train", "calibration"), boundaries):
            self._readers[split, boundary] = BoundaryReader(paths.activations, split, boundary)
        self._key = digest_of(
            {
                "settings": settings.model_dump(),
                "run": run.model_dump(exclude={"workers"}),
                "child": assembled.checksums,
                "activations": self._inputs(),
                "steps": self._groups,
                "code": code_digest("tasks.distill_child:_Training"),
            }
        )
        self.curve = GkdCurve(target, (), (), 0)

    def run(self) -> None:
        """Train to the end, from the last checkpoint or from the start."""
        self._resume()
        every, total = self._params.distill_child.checkpoint_steps, len(self._groups)
        with ThreadPoolExecutor(self._params.run.workers) as pool:
            if not self.curve.held_out:
                self._measure(pool)
            progress = tqdm(self._groups, desc="distill", unit="step", initial=len(self.curve.steps), disable=None)
            for group in self._groups[len(self.curve.steps) :]:
                self._step(pool, group)
                progress.update()
                if len(self.curve.steps) % every == 0 or len(self.curve.steps) == total:
                    self._measure(pool)
                    progress.set_postfix(kl=f"{self.curve.held_out[-1].kl:.3f}")
                    self._save()
            progress.close()

    def best_blocks(self) -> Iterator[dict[str, Tensor]]:
        """Tensors of each block at the best measurement, named as within a Llama layer."""
        for index in range(len(self._child.layers)):
            prefix = f"layers.{index}."
            yield {name.removeprefix(prefix): tensor for name, tensor in self._best.items() if name.startswith(prefix)}

    def _step(self, pool: Executor, group: list[int]) -> None:
        rate = self._masters.rate
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self._masters.narrow]
        losses = []
        for sequence_gradients, loss in pool.map(self._gradients, group):
            torch._foreach_add_(total, sequence_gradients, alpha=1 / len(group))
            losses.append(loss)
        norm = float(torch.nn.utils.get_total_norm(total))
        if norm > self._params.distill_child.clip_norm:
            torch._foreach_mul_(total, self._params.distill_child.clip_norm / norm)
        self._masters.apply(total)
        number = len(self.curve.steps) + 1
        step = GkdStep(
            step=number,
            tokens=number * len(group) * self._params.prepare_corpus.seq_len,
            loss=fmean(loss.total for loss in losses),
            kl=fmean(loss.kl for loss in losses),
            cosine=fmean(loss.cosine for loss in losses),
            learning_rate=rate,
        )
        self.curve = replace(self.curve, steps=(*self.curve.steps, step))

    def _gradients(self, sequence: int) -> tuple[list[Tensor], Losses]:
        """Gradients and losses of one sequence; runs on a worker's thread."""
        settings, run = self._params.distill_child, self._params.run
        prepare_compute(run.device, run.dtype, run.threads)
        weights = LossWeights(settings.kl_weight, settings.cosine_weight)
        return gradients(self._child, self._states("train", sequence), self._head, weights)

    def _measure(self, pool: Executor) -> None:
        """Measure the held-out KL, and keep the weights if it is the lowest so far."""
        run, settings, seq_len = self._params.run, self._params.distill_child, self._params.prepare_corpus.seq_len

        def sequence_kl(sequence: int) -> float:
            prepare_compute(run.device, run.dtype, run.threads)
            return kl_to_parent(self._child, self._states("calibration", sequence), self._head)

        kl, done = fmean(pool.map(sequence_kl, _held_out(self._params))), len(self.curve.steps)
        is_best = not self.curve.held_out or kl < self.curve.best.kl
        if is_best:
            self._best = self._weights()
        measurement = HeldOutKl(done, done * settings.sequences_per_step * seq_len, kl)
        self.curve = replace(
            self.curve,
            held_out=(*self.curve.held_out, measurement),
            best_step=done if is_best else self.curve.best_step,
        )

    def _states(self, split: str, sequence: int) -> States:
        device, narrow = self._head.weight.device, self._head.weight.dtype
        return lambda boundary: self._readers[split, boundary].read([sequence]).to(device, narrow)

    def _inputs(self) -> list[list[str]]:
        """Checksums of all cached activations that the training and its measurements read."""
        trained = [sequence for group in self._groups for sequence in group]
        read = {"train": range(min(trained), max(trained) + 1), "calibration": _held_out(self._params)}
        return [reader.digest(read[split].start, read[split].stop) for (split, _), reader in self._readers.items()]

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._child.named_parameters()}

    def _save(self) -> None:
        """Write a checkpoint: the tensors, then their record; the earlier checkpoint is deleted last."""
        path = self._pieces.folder / f"state_{len(self.curve.steps):06d}.safetensors"
        best = {f"best.{name}": tensor for name, tensor in self._best.items()}
        with write_whole(path) as temporary:
            save_file(self._masters.state() | best, temporary)
        self._pieces.finish(_STATE, self._key, [path], asdict(self.curve))
        self._pieces.keep_only({_STATE: self._key})

    def _resume(self) -> None:
        """Go on from the last checkpoint of this very training, if there is one; delete those of others."""
        if self._pieces.keep_only({_STATE: self._key}):
            return
        record = self._pieces.get(_STATE)
        self.curve = as_record(record["facts"], GkdCurve, str(self._pieces.folder), self._pieces.rebuild)
        (name,) = record["files"]
        state = load_file(self._pieces.folder / name)
        self._best = {key: state[f"best.{key}"] for key in self._best}  # in the order of an uninterrupted run
        self._masters.restore(state, len(self.curve.steps))


def _steps(params: Params) -> list[list[int]]:
    """Train sequences of each step: those behind BLD's in the split, in a seeded order, each used once."""
    settings, seq_len = params.distill_child, params.prepare_corpus.seq_len
    first = params.distill_blocks.used_tokens // seq_len
    generator = torch.Generator().manual_seed(params.run.seed)
    order = (first + torch.randperm(settings.tokens // seq_len, generator=generator)).tolist()
    size = settings.sequences_per_step
    return [order[start : start + size] for start in range(0, len(order), size)]


def _held_out(params: Params) -> range:
    """Calibration sequences of the held-out KL: the end of the split, as in BLD."""
    seq_len, stop = params.prepare_corpus.seq_len, params.prepare_corpus.calibration_tokens
    return range((stop - params.distill_child.held_out_tokens) // seq_len, stop // seq_len)
