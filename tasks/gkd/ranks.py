"""One rank of a global distillation in shards (FSDP2), as torchrun starts it; distill_child starts them on one machine.

`distill_child.ranks: n` has the stage start n of these processes here, a device each (tasks/gkd/launch.py). On several
nodes that share the artifacts' folder, start them by hand in the project's folder on every node, then let DVC publish:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint NODE:29500 \
        -m tasks.gkd.ranks --target like-51b
    dvc repro distill_child@like-51b

The training is then finished, so that the stage, with `ranks` of 1 or more, only publishes it. A checkpoint goes on
with any number of ranks of 1 or more. Sequences of a step are dealt out to the ranks; those that get none in a round
compute one that does not count, so `sequences_per_step` is best a multiple of ranks x `sequences_per_batch`. The same
number of ranks gives the same bytes on a CPU. Rank 0 prints a line of JSON for each step and measurement.
"""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import DTensor

from storage.code_digest import code_digest
from storage.files import InputError, digest_of
from storage.gkd import GkdCurve
from storage.params import PARAMS_FILE, Params, load
from storage.parent import Parent
from storage.paths import Paths
from tasks.checkpoints.children import architecture_for
from tasks.engines.machine import on_this_machine
from tasks.gkd.course import Course, Measurement, StepGradient
from tasks.gkd.material import CachedStates, Material, head_of, material_of
from tasks.gkd.sharded_checkpoint import ShardedCheckpoint
from tasks.gkd.teachers import ShardedStates, StreamedStates
from tasks.puzzle.distill.gkd import Losses, LossWeights, sick_part
from tasks.puzzle.distill.sharded import MOMENTS, ShardedAdam, ShardedChild, Sharding, backward, sharded_kl
from tasks.puzzle.model.device import prepare_compute

_WATCH_SECONDS = 0.5


def checkpoint_of(material: Material, target: str, paths: Paths) -> ShardedCheckpoint:
    """Return the checkpoint of a training on ranks; any number of them goes on from it."""
    code = code_digest("tasks.gkd.ranks:_RankTrainer", "tasks.gkd.course:Course")
    return ShardedCheckpoint(target, digest_of([material.digest, code]), paths)


class _Prepared(CachedStates):
    """The parent's hidden states from the cache, which needs no preparation before a step."""

    def prepare(self, _: Sequence[Sequence[int]]) -> None:
        """Do nothing."""


class _RankTrainer:
    """This rank's share of a child in training."""

    def __init__(self, course: Course, material: Material, params: Params, paths: Paths) -> None:
        settings, run = params.distill_child, params.run
        self._rank, self._ranks, self._at_once = dist.get_rank(), dist.get_world_size(), settings.sequences_per_batch
        compute = prepare_compute(device_of_rank(run.device), run.dtype, run.threads)
        if compute.device.type == "cuda":
            torch.cuda.set_device(compute.device)
        mesh = init_device_mesh(compute.device.type, (self._ranks,))
        sharding = Sharding(mesh, compute, offloaded=settings.offload)
        self._cpu_mesh = init_device_mesh("cpu", (self._ranks,))
        cpu, parent = torch.device("cpu"), Parent(paths.parent)
        self._child = ShardedChild.load(
            material.config,
            material.variants,
            material.ends,
            sharding,
            lambda index: material.refined.block(index, cpu, compute.dtype),
        )
        self._weights = self._child.weights()
        self._adam = ShardedAdam(self._weights, course.schedule)
        self._dtype, self._head = compute.dtype, head_of(paths, compute)
        self._weights_of_loss = LossWeights(settings.kl_weight, settings.cosine_weight)
        self._train = self._teacher(material, parent, sharding, params, paths)
        self._held_out = CachedStates("calibration", [0, self._child.last], compute, paths)
        self._checkpoint = checkpoint_of(material, course.curve.target, paths)
        self._best: dict[str, Tensor] = {}
        self._scale = 1.0

    def _teacher(
        self, material: Material, parent: Parent, sharding: Sharding, params: Params, paths: Paths
    ) -> _Prepared | ShardedStates | StreamedStates:
        if material.tokens is None:
            return _Prepared("train", material.boundaries, sharding.compute, paths)
        if params.distill_child.teacher == "streamed":
            return StreamedStates(material, parent, sharding.compute)
        return ShardedStates(material, parent, replace(sharding, offloaded=False))

    def _batches(self, group: Sequence[int]) -> list[tuple[list[int], int]]:
        """Return this rank's batches of a group, and how many sequences of each count; as many on every rank."""
        rounds = math.ceil(math.ceil(len(group) / self._ranks) / self._at_once)
        mine = list(group[self._rank :: self._ranks])
        batches = [mine[start : start + self._at_once] for start in range(0, len(mine), self._at_once)]
        counted = [(batch, len(batch)) for batch in batches]
        return counted + [([group[0]], 0)] * (rounds - len(counted))

    def gradient(self, group: list[int]) -> StepGradient:
        """Add up the gradients of this rank's sequences, batch by batch, over all ranks."""
        batches, sums = self._batches(group), torch.zeros(2, dtype=torch.float64)
        self._train.prepare([batch for batch, _ in batches])
        for batch, count in batches:
            states = self._train.of(batch)
            losses = backward(self._child, states, self._head, self._weights_of_loss, float(count))
            if count:
                sums += count * torch.tensor([losses.kl, losses.cosine], dtype=torch.float64)
        dist.all_reduce(sums)
        kl, cosine = (float(total) / len(group) for total in sums)
        losses = Losses(kl, cosine, self._weights_of_loss.kl * kl + self._weights_of_loss.cosine * cosine)
        gradients, self._scale = self._adam.gradients(), 1 / len(group)
        squares = torch.stack([rows.double().square().sum() for rows in gradients.values()]).sum().cpu()
        dist.all_reduce(squares)
        norm = self._scale * math.sqrt(float(squares))
        return StepGradient(losses, norm, sick_part([losses], norm, _marked(gradients)))

    def apply(self, scale: float) -> None:
        """Take the step on this rank's rows."""
        self._adam.apply(scale * self._scale)
        self._tell({"steps": 1})

    def held_out_kl(self, sequences: range) -> float:
        """Measure the mean KL of held-out sequences, some on each rank."""
        total = torch.zeros((), dtype=torch.float64)
        for batch, count in self._batches(sequences):
            kl = sharded_kl(self._child, self._held_out.of(batch), self._head)
            total += count * kl if count else 0.0
        dist.all_reduce(total)
        return float(total) / len(sequences)

    def keep(self) -> None:
        """Remember the present weights as the best so far, in the compute dtype, on the CPU."""
        self._best = {
            name: self._on_cpu(weight, weight.to_local().detach().to(self._dtype, copy=True))
            for name, weight in self._weights.items()
        }

    def _on_cpu(self, weight: DTensor, rows: Tensor) -> Tensor:
        """Return rows that belong to a weight as its shard on the CPU."""
        return DTensor.from_local(
            rows.cpu(),
            self._cpu_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )

    def agree(self, is_due: bool) -> bool:
        """Return what rank 0 says."""
        answer = torch.tensor(int(is_due))
        dist.broadcast(answer, 0)
        return bool(answer)

    def save(self, curve: GkdCurve) -> None:
        """Write a checkpoint."""
        self._checkpoint.save(curve, self._kinds())

    def _kinds(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield what a checkpoint holds, one kind of tensor after the other."""
        yield "master", {name: weight.detach() for name, weight in self._weights.items()}
        for moment in MOMENTS:
            yield moment, self._adam.moments(moment)
        yield "best", self._best

    def resume(self) -> GkdCurve | None:
        """Go on from the last checkpoint of this training, whatever number of ranks wrote it."""
        curve = self._checkpoint.take()
        if curve is not None:
            self._adam.restore(len(curve.steps))
            self.keep()  # room for what is read
            for kind, tensors in self._kinds():
                self._checkpoint.read(kind, tensors)
            self._tell({"steps": len(curve.steps)})
        return curve

    def watch(self, measured: Measurement) -> None:
        """Show a measurement to whoever started the ranks."""
        self._tell(asdict(measured))

    def _tell(self, line: dict[str, object]) -> None:
        if self._rank == 0:
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


def _marked(gradients: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight's name with a tensor that is NaN where any rank's rows of its gradient are not finite."""
    sick = torch.tensor([int(not rows.isfinite().all()) for rows in gradients.values()])
    dist.all_reduce(sick, dist.ReduceOp.MAX)
    for name, is_sick in zip(gradients, sick, strict=True):
        yield name, torch.tensor(math.nan if is_sick else 0.0)


def device_of_rank(device: str) -> str:
    """Return this rank's device: on a GPU machine the one of its number there."""
    local_rank = int(os.environ["LOCAL_RANK"])
    return f"cuda:{local_rank}" if device == "cuda" else device


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended, however that was."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


@record
def _train(target: str, params: Params, paths: Paths) -> None:
    """Train as one of the ranks; an error is also in the file that torchrun names, with its time."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if params.run.device.startswith("cuda") else "gloo")
    chosen = architecture_for(Parent(paths.parent), target, paths)
    course = Course(target, params)
    material = material_of(course, chosen.blocks, params, paths)
    trainer = _RankTrainer(course, material, params, paths)
    course.run(trainer, trainer.watch)
    trainer.save(course.curve)
    dist.destroy_process_group()


def main() -> None:
    """Run one rank; torchrun's environment says which."""
    parser = argparse.ArgumentParser(prog="python -m tasks.gkd.ranks", description="One rank of a distillation.")
    parser.add_argument("--target", required=True, help="key of the target")
    parser.add_argument("--params", type=Path, default=PARAMS_FILE, help="params.yaml")
    parser.add_argument("--artifacts", type=Path, default=Paths().root, help="folder of the artifacts")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="process with which this one ends")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with, args=(arguments.parent,), daemon=True).start()
    try:
        loaded = load(arguments.params)
        loaded.target(arguments.target)
        params = on_this_machine(loaded)
        if "RANK" not in os.environ:
            raise InputError(
                "a rank is started by torchrun (tasks/gkd/ranks.py says how), or by the stage: set distill_child.ranks,"
                f" then run `dvc repro distill_child@{arguments.target}`"
            )
        if not params.distill_child.tokens:
            raise InputError("distill_child.tokens is 0, there is nothing to train; give it tokens")
        _train(arguments.target, params, Paths(arguments.artifacts, params.storage))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
