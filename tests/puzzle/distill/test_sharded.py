"""A child in shards of one rank: the gradients of sequences one by one, moments where the masters are, as a teacher."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh

from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn
from tasks.puzzle.distill.gkd import gradients, kl_to_parent
from tasks.puzzle.distill.optimizer import MasterWeights, Schedule
from tasks.puzzle.distill.sharded import (
    MOMENTS,
    ShardedAdam,
    ShardedChild,
    ShardedTeacher,
    Sharding,
    backward,
    embedded,
    sharded_kl,
)
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import Compute
from tests.puzzle.distill.test_gkd import CPU, WEIGHTS, Case
from tests.tiny import FAMILIES

SCHEDULE = Schedule(num_steps=6, learning_rate=0.1, warmup=0.2, weight_decay=0.01)


@pytest.fixture
def sharding() -> Iterator[Sharding]:
    """Return shards of the only rank of a group."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield Sharding(init_device_mesh("cpu", (1,)), Compute(CPU, torch.float32))
    dist.destroy_process_group()


def in_shards(case: Case, sharding: Sharding) -> ShardedChild:
    """Return the case's child in shards."""
    blocks = [block for block in case.child.layers if isinstance(block, Block)]
    variants = [(block.attention, block.ffn) for block in blocks]
    tensors = [{name: tensor.clone() for name, tensor in block.state_dict().items()} for block in blocks]
    return ShardedChild.load(case.child.config, variants, case.child.ends, sharding, tensors.__getitem__)


@pytest.mark.parametrize("ends", [(1, 2, 3), (None, None, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batchs_gradient_is_the_mean_of_its_sequences(
    family: str, ends: tuple[int | None, ...], sharding: Sharding, tmp_path: Path
) -> None:
    """Each of two batches of two sequences counts twice: four times the mean, added up."""
    case = Case(tmp_path, family, ends=ends)
    child, other = in_shards(case, sharding), [state.flip(1) for state in case.states]
    computed = [gradients(case.child, states.__getitem__, case.head, WEIGHTS) for states in (case.states, other)]
    pairs = [torch.cat(pair) for pair in zip(case.states, other, strict=True)]
    for _ in range(2):
        losses = backward(child, pairs.__getitem__, case.head, WEIGHTS, 2.0)
        for term in ("kl", "cosine", "total"):
            mean = sum(getattr(loss, term) for _, loss in computed) / 2
            assert getattr(losses, term) == pytest.approx(mean, rel=1e-5)
    rows = ShardedAdam(child.weights(), SCHEDULE).gradients()
    assert [*rows] == [name for name, _ in case.child.named_parameters()]
    for mine, first, second in zip(rows.values(), computed[0][0], computed[1][0], strict=True):
        # float32, sums in another order; a gradient's size is what its rounding is relative to
        torch.testing.assert_close(mine, 2 * (first + second), atol=1e-4 * float(mine.abs().max()), rtol=1e-3)
    kl = kl_to_parent(case.child, case.state, case.head)
    assert sharded_kl(child, case.state, case.head) == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("offloaded", [False, True])
def test_steps_are_those_of_masters_in_threads(offloaded: bool, sharding: Sharding, tmp_path: Path) -> None:
    """Bit for bit, where the gradient is the same; masters that wait elsewhere are the same masters."""
    case = Case(tmp_path, "llama")
    child = in_shards(case, replace(sharding, offloaded=offloaded))
    adam, masters = ShardedAdam(child.weights(), SCHEDULE), MasterWeights(case.child, SCHEDULE)
    for _ in range(3):
        backward(child, case.state, case.head, WEIGHTS, 1.0)
        copied = [rows.clone() * 0.5 for rows in adam.gradients().values()]
        adam.apply(0.5)
        masters.apply(copied)
    for (name, weight), narrow in zip(child.weights().items(), masters.narrow, strict=True):
        assert torch.equal(weight.to_local(), narrow), name


def test_a_block_without_subblocks_and_nothing_that_trains_before_the_first_loss(
    sharding: Sharding, tmp_path: Path
) -> None:
    case = Case(tmp_path, "llama")
    empty = (Attention("no_op"), Ffn("no_op"))
    blocks = [block for block in case.child.layers if isinstance(block, Block)]
    variants = [empty, *((block.attention, block.ffn) for block in blocks[1:])]
    tensors: list[dict[str, Tensor]] = [{}, *(block.state_dict() for block in blocks[1:])]
    child = ShardedChild.load(case.child.config, variants, [1, 2, 3], sharding, tensors.__getitem__)
    losses = backward(child, case.state, case.head, WEIGHTS, 1.0)
    assert losses.kl > 0 and len(child.weights()) == sum(map(len, tensors))
    assert all(rows.isfinite().all() for rows in ShardedAdam(child.weights(), SCHEDULE).gradients().values())


def test_moments_are_restored_where_the_masters_are(sharding: Sharding, tmp_path: Path) -> None:
    """A child that was split and not filled yet is on a device without memory, which stands for a GPU."""
    case = Case(tmp_path, "llama")
    variants = [(block.attention, block.ffn) for block in case.child.layers if isinstance(block, Block)]
    child = ShardedChild(case.child.config, variants, [1, 2, 3])
    for layer in child.layers:
        sharding.split(layer)
    adam = ShardedAdam(child.weights(), SCHEDULE)
    adam.restore(4)
    assert adam._step == 4
    for weight, state in adam._optimizer.state.items():
        assert {name: tensor.device.type for name, tensor in state.items()} == dict.fromkeys(
            ("step", *MOMENTS), weight.device.type
        )
    assert {weight.to_local().device.type for weight in child.weights().values()} == {"meta"}


def test_a_teacher_in_shards_has_the_states_of_the_parent(sharding: Sharding, tmp_path: Path) -> None:
    case = Case(tmp_path, "llama3-untied-head_dim-bias")
    teacher = case.teacher
    config: ModelConfig = case.child.config
    tensors = [block.state_dict() for block in teacher._blocks]
    sharded = ShardedTeacher.load(config, sharding, tensors.__getitem__)
    assert not any(parameter.requires_grad for parameter in sharded.parameters())
    with torch.no_grad():
        states = sharded(embedded(teacher._embedding, case.tokens), [0, 1, 3])
    live = teacher.states(case.tokens)
    assert states.keys() == {0, 1, 3}
    assert all(torch.equal(state, live(boundary)) for boundary, state in states.items())
