"""GKD's child and its teacher in shards (FSDP2): every rank keeps some rows of each weight, none keeps a whole model.

A block's whole weights exist while it computes, in the compute dtype. What training keeps lies in shards: float32
masters, their gradients summed in float32, AdamW's moments. Blocks are made without memory (meta), split, and then
filled one at a time from the checkpoint. In the backward pass a block is computed a second time, with its cosine
distance, so that memory holds the states at boundaries and what one block needs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn
from tasks.puzzle.distill.gkd import Losses, LossWeights, States, distance, kl_of, loss_of
from tasks.puzzle.distill.optimizer import BETAS, Schedule
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import Compute
from tasks.puzzle.model.head import Head
from tasks.puzzle.model.rotary import Rotary, rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn

BlockTensors = Callable[[int], Mapping[str, Tensor]]
"""Reads the tensors of a block, named as within a Llama layer, on the CPU."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Sharding:
    """The split of weights over the ranks of a one-dimensional mesh, each of which computes on a device of its own.

    Where they are offloaded, each rank's rows wait in the machine's memory: masters, gradients and moments.
    """

    mesh: DeviceMesh
    compute: Compute
    offloaded: bool = False

    def split(self, module: nn.Module) -> None:
        """Give each rank some rows of every weight of a module; its gradients are added up over the ranks."""
        policy = MixedPrecisionPolicy(param_dtype=self.compute.dtype, reduce_dtype=torch.float32)
        on_gpu = self.compute.device.type == "cuda"
        waiting = CPUOffloadPolicy(pin_memory=on_gpu) if self.offloaded else OffloadPolicy()
        fully_shard(module, mesh=self.mesh, mp_policy=policy, offload_policy=waiting)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no mean

    def fill(self, module: nn.Module, weights: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Give a module that was split, and has no memory yet, this rank's rows of `tensors`.

        `weights` is the part of the module in which weights have the names of `tensors`.
        """
        if not tensors:
            return
        module.to_empty(device="cpu" if self.offloaded else self.compute.device)
        parameters = dict(weights.named_parameters())
        assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
        for name, tensor in tensors.items():
            parameter = parameters[name]
            assert isinstance(parameter, DTensor) and parameter.shape == tensor.shape, name
            with torch.no_grad():
                parameter.to_local().copy_(tensor[self._rows(len(tensor))])

    def _rows(self, count: int) -> slice:
        """Return the rows of a matrix that this rank keeps: as even as whole rows allow, the last ones may be fewer."""
        share = -(-count // self.mesh.size())
        return slice(self.mesh.get_local_rank() * share, (self.mesh.get_local_rank() + 1) * share)


class _TaughtBlock(nn.Module):
    """A block of the child, and how far its output is from the parent's."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, rotary: Rotary, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute the block's output, and its distance from `target` where there is one."""
        if not torch.is_grad_enabled():
            return self._compute(hidden, rotary, target)
        computed: tuple[Tensor, Tensor | None] = checkpoint(
            self._compute, hidden, rotary, target, use_reentrant=False, preserve_rng_state=False
        )
        return computed

    def _compute(self, hidden: Tensor, rotary: Rotary, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        output = self.block(hidden, rotary)
        return output, None if target is None else distance(output, target)


class ShardedChild(nn.Module):
    """A child's blocks in shards, all trainable; `ends` as in a TrainableChild (tasks/puzzle/distill/gkd.py)."""

    def __init__(
        self, config: ModelConfig, variants: Sequence[tuple[Attention, Ffn]], ends: Sequence[int | None]
    ) -> None:
        super().__init__()
        self._config, self.ends = config, list(ends)
        assert ends[-1] is not None
        self.last = ends[-1]
        with torch.device("meta"):
            self.layers = nn.ModuleList(_TaughtBlock(Block(config, *variant)) for variant in variants)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        variants: Sequence[tuple[Attention, Ffn]],
        ends: Sequence[int | None],
        sharding: Sharding,
        tensors: BlockTensors,
    ) -> "ShardedChild":
        """Make a child whose blocks are read one at a time; every rank calls it."""
        child = cls(config, variants, ends)
        for layer in child.layers:
            if [*layer.parameters()]:  # a block without both subblocks has none
                sharding.split(layer)
        sharding.split(child)
        for index, layer in enumerate(child.layers):
            assert isinstance(layer, _TaughtBlock)
            sharding.fill(layer, layer.block, tensors(index))
        return child

    def forward(self, states: States, with_distances: bool) -> tuple[Tensor, list[Tensor]]:
        """Compute the last hidden states [sequences, tokens, hidden], and the distances that the loss asks for."""
        hidden, distances = states(0), list[Tensor]()
        rotary = rotary_for(self._config, hidden.shape[1], hidden)
        for layer, end in zip(self.layers, self.ends, strict=True):
            target = states(end) if with_distances and end is not None else None
            hidden, distance = layer(hidden, rotary, target)
            distances += [] if distance is None else [distance]
        return hidden, distances

    def weights(self) -> dict[str, DTensor]:
        """Return the masters by name, such as layers.0.mlp.up_proj.weight."""
        named = {name.replace(".block.", ".", 1): parameter for name, parameter in self.named_parameters()}
        return {name: parameter for name, parameter in named.items() if isinstance(parameter, DTensor)}


def backward(child: ShardedChild, states: States, head: Head, weights: LossWeights, share: float) -> Losses:
    """Add `share` times the gradient of the mean loss of some sequences to the masters'; every rank calls it.

    Returns the mean loss of this rank's sequences.
    """
    last, distances = child(states, with_distances=True)
    loss = loss_of(last, distances, states(child.last), head, weights)
    torch.autograd.backward(loss.parts, [share * gradient for gradient in loss.gradients])
    return loss.losses


def sharded_kl(child: ShardedChild, states: States, head: Head) -> float:
    """Measure KL(parent || child) of this rank's sequences, nats per token; every rank calls it."""
    with torch.no_grad():  # not inference mode: weights that it gathers could not be trained afterwards
        last, _ = child(states, with_distances=False)
        return kl_of(last, states(child.last), head)


class ShardedAdam:
    """AdamW on a child's masters, each rank on its own rows."""

    def __init__(self, weights: Mapping[str, DTensor], schedule: Schedule) -> None:
        self._weights, self._schedule, self._step = weights, schedule, 0
        self._optimizer = torch.optim.AdamW(
            weights.values(),
            lr=schedule.learning_rate,
            betas=BETAS,
            weight_decay=schedule.weight_decay,
            fused=True,
        )

    def gradients(self) -> dict[str, Tensor]:
        """Return this rank's rows of the gradients that were added up."""
        rows = {}
        for name, weight in self._weights.items():
            assert isinstance(weight.grad, DTensor), name
            rows[name] = weight.grad.to_local()
        return rows

    def apply(self, scale: float) -> None:
        """Take the step with the gradients times `scale`, and begin other sums."""
        torch._foreach_mul_(list(self.gradients().values()), scale)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.rate(self._step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1

    def moments(self, moment: str) -> dict[str, Tensor]:
        """Return one of MOMENTS by the names of the weights."""
        return {name: self._optimizer.state[weight][moment] for name, weight in self._weights.items()}

    def restore(self, step: int) -> None:
        """Make room for moments after `step` steps, on the device of the masters; a checkpoint is read into it."""
        self._step = step
        for weight in self._weights.values():
            self._optimizer.state[weight] = {
                "step": torch.tensor(float(step), device=weight.to_local().device),
                **{moment: torch.empty_like(weight, requires_grad=False) for moment in MOMENTS},
            }


class ShardedTeacher(nn.Module):
    """The parent's blocks in shards, in the compute dtype; nothing trains."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self._config = config
        variants = parent_attention(config), parent_ffn(config)
        with torch.device("meta"):
            self.layers = nn.ModuleList(Block(config, *variants).to(dtype) for _ in range(config.num_blocks))
        self.requires_grad_(False)

    @classmethod
    def load(cls, config: ModelConfig, sharding: Sharding, tensors: BlockTensors) -> "ShardedTeacher":
        """Make a teacher whose blocks are read one at a time; every rank calls it."""
        teacher = cls(config, sharding.compute.dtype)
        for layer in teacher.layers:
            sharding.split(layer)
        sharding.split(teacher)
        for index, layer in enumerate(teacher.layers):
            sharding.fill(layer, layer, tensors(index))
        return teacher

    def forward(self, hidden: Tensor, boundaries: Iterable[int]) -> dict[int, Tensor]:
        """Compute some boundaries, each [sequences, tokens, hidden], from boundary 0; every rank calls it."""
        rotary, states, asked_for = rotary_for(self._config, hidden.shape[1], hidden), {0: hidden}, {*boundaries}
        for boundary, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, rotary)
            if boundary in asked_for:
                states[boundary] = hidden
        return states


def embedded(embedding: Tensor, tokens: Tensor) -> Tensor:
    """Look up boundary 0, [sequences, tokens, hidden], of tokens [sequences, tokens] int64; a child may start there."""
    with torch.no_grad():
        return functional.embedding(tokens.to(embedding.device), embedding)
