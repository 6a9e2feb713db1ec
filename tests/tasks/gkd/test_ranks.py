"""Ranks: the losses of threads whatever their number, a checkpoint for any other number, teachers, what is sick."""

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from storage.checkpoints import Checkpoint
from storage.params import Params
from storage.paths import Paths
from tasks import distill_child
from tasks.gkd import ranks
from tasks.gkd.course import Course
from tasks.gkd.teachers import ShardedStates
from tasks.puzzle.distill import sharded
from tasks.puzzle.distill.gkd import Losses
from tasks.puzzle.distill.sharded import backward
from tests.stages import checksums, make_child, prepare
from tests.tasks.gkd.rank_processes import Ended, run_ranks
from tests.tasks.test_distill_child import with_settings
from tests.tiny import flip_byte

TOLERANCE = 1e-5
"""float32: ranks add the same gradients up in another order, and eight steps of AdamW carry that on."""
PATCH = pytest.MonkeyPatch()
"""Changes a rank, which ends with its changes."""


@pytest.fixture(scope="module")
def in_threads(child: tuple[Params, Paths], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return gkd.json of the thread path, and its weights."""
    paths = Paths(tmp_path_factory.mktemp("threads") / "artifacts")
    shutil.copytree(child[1].root, paths.root)
    return published(child[0], paths)


def published(params: Params, paths: Paths) -> dict[str, Any]:
    """Distil, or publish what ranks finished; return gkd.json and the weights."""
    distill_child.distill.fn("small", params, paths)
    child = Checkpoint(paths.distilled("small"), "the test")
    curve: dict[str, Any] = json.loads(paths.gkd("small").read_text(encoding="utf-8"))
    return {**curve, "weights": {name: child.tensor(name) for name in child.checksums}}


def trained(count: int, params: Params, paths: Paths) -> dict[str, Any]:
    """Train on some ranks and publish, which starts no others; return gkd.json and the weights."""
    ended = run_ranks(count, params, paths)
    assert ended.codes == [0] * count, ended.errors
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("tasks.gkd.launch._run")
        return published(with_settings(params, ranks=1), paths)


def assert_same_training(one: dict[str, Any], other: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Compare every step, every measurement and the published weights."""
    assert len(one["steps"]) == len(other["steps"]) and one["best_step"] == other["best_step"]
    for mine, theirs in zip(one["steps"] + one["held_out"], other["steps"] + other["held_out"], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_ranks_trains_as_threads_do(
    count: int, case: tuple[Params, Paths], in_threads: dict[str, Any]
) -> None:
    """Four ranks have two sequences a step: two of them compute one that does not count."""
    assert_same_training(trained(count, *case), in_threads)


@pytest.mark.parametrize(("at_once", "in_step"), [(2, 4), (3, 8)])
def test_batches_of_several_sequences_are_the_same_training(
    at_once: int, in_step: int, case: tuple[Params, Paths], tmp_path: Path
) -> None:
    """Of eight sequences each of two ranks has batches of three and of one."""
    params, paths = with_settings(case[0], sequences_per_step=in_step), Paths(tmp_path / "threads")
    shutil.copytree(case[1].root, paths.root)
    in_batches = with_settings(params, ranks=2, sequences_per_batch=at_once)
    assert_same_training(trained(2, in_batches, case[1]), published(params, paths))


def test_the_same_ranks_give_the_same_bytes(case: tuple[Params, Paths]) -> None:
    both = []
    for _ in range(2):
        trained(2, *case)
        both.append(checksums(case[1].distilled("small")))
    assert both[0] == both[1]


def test_in_bfloat16_masters_are_float32(tmp_path: Path) -> None:
    """A gradient of a sequence is rounded to 8 bits, 0.4 %, in both."""
    params, paths = prepare("llama", tmp_path, run={"dtype": "bfloat16"})
    make_child(params, paths)
    copied = Paths(tmp_path / "threads")
    shutil.copytree(paths.root, copied.root)
    in_ranks, in_threads = trained(2, params, paths), published(params, copied)
    for step, other in zip(in_ranks["steps"], in_threads["steps"], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=0.01)
    first, *_, last = (pair for pair in zip(in_ranks["held_out"], in_threads["held_out"], strict=True))
    moved, moved_in_threads = (before["kl"] - after["kl"] for before, after in zip(first, last, strict=True))
    assert moved == pytest.approx(moved_in_threads, rel=0.05), "bfloat16 masters would lose most of steps this small"


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _stop_after(steps: int) -> None:
    """End this rank as by Ctrl-C before it takes one more step than `steps`."""
    apply, left = ranks._RankTrainer.apply, iter(range(steps))

    def applied(trainer: ranks._RankTrainer, scale: float) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        apply(trainer, scale)

    PATCH.setattr(ranks._RankTrainer, "apply", applied)


def after_four(_: int) -> None:
    """Stop after four steps."""
    _stop_after(4)


def steps_told(ended: Ended) -> Iterator[int]:
    """Yield the numbers of steps that rank 0 told, first those that the checkpoint had."""
    told = map(json.loads, ended.lines)
    return (line["steps"] for line in told if "steps" in line)


def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    case: tuple[Params, Paths], in_threads: dict[str, Any]
) -> None:
    """Two stop after step 4, four after step 7, one ends it; checkpoints are behind steps 3 and 6."""
    params, paths = case
    stopped = run_ranks(2, params, paths, after_four)
    assert 0 not in stopped.codes and [*steps_told(stopped)] == [1, 1, 1, 1]
    stopped = run_ranks(4, params, paths, after_four)
    assert 0 not in stopped.codes and [*steps_told(stopped)] == [3, 1, 1, 1, 1]
    ended = run_ranks(1, params, paths)
    assert ended.codes == [0] and [*steps_told(ended)] == [6, 1, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("tasks.gkd.launch._run")
        assert_same_training(published(with_settings(params, ranks=4), paths), in_threads)


def test_no_file_of_a_checkpoint_is_a_pickle_and_each_rank_wrote_its_share(case: tuple[Params, Paths]) -> None:
    params, paths = case
    run_ranks(2, params, paths, after_four)
    [state] = paths.gkd_state("small").glob("state_*")
    files = [path for path in state.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors"}
    assert {path.parent.name for path in files} == {"master", "exp_avg", "exp_avg_sq", "best"}
    sizes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            sizes[path.parent.name, path.name] = sum(file.get_tensor(name).numel() for name in list(file.keys()))
    assert len(sizes) == 8 and len(set(sizes.values())) == 1, "all dimensions of the tiny child are even"


@pytest.mark.parametrize("damage", ["byte", "record", "rate", "unfinished"])
def test_what_is_not_a_whole_checkpoint_of_this_training_is_not_taken(
    damage: str, case: tuple[Params, Paths], in_threads: dict[str, Any]
) -> None:
    params, paths = case
    run_ranks(2, params, paths, after_four)
    state = paths.gkd_state("small") / "state_000003"
    if damage == "byte":
        flip_byte(sorted(state.rglob("*.safetensors"))[-1], -100)
    elif damage == "record":
        flip_byte(paths.gkd_state("small") / ".pieces/state.json", -100)
    elif damage == "rate":
        params = with_settings(params, learning_rate=2e-3)
    else:  # killed between the folder's name and its record
        state.rename(state.with_name("state_000006"))
    ended = run_ranks(2, params, paths)
    assert ended.codes == [0, 0] and [*steps_told(ended)] == [1] * 8
    assert [path.name for path in paths.gkd_state("small").glob("*state_*")] == ["state_000008"]


# --- teachers, shards, what is sick ----------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["live", "streamed"])
def test_a_live_teacher_in_shards_and_a_streamed_one_teach_what_the_cache_holds(
    teacher: str, case: tuple[Params, Paths], in_threads: dict[str, Any]
) -> None:
    """The cache is float32 here, so that it rounds nothing; where masters wait changes nothing either."""
    shards = {"ranks": 2, "offload": teacher == "streamed", "sequences_per_batch": 2}
    params = with_settings(case[0], teacher=teacher, **shards)
    assert_same_training(trained(2, params, case[1]), in_threads)


def count_weights(_: int) -> None:
    """Have this rank say how many elements of weights it has once child and teacher are loaded, and end."""

    def counted(_: Course, trainer: ranks._RankTrainer, __: Any) -> None:
        assert isinstance(trainer._train, ShardedStates)
        for name, module in (("child", trainer._child), ("teacher", trainer._train._teacher)):
            parameters = [parameter for parameter in module.parameters() if isinstance(parameter, DTensor)]
            held = sum(parameter.to_local().untyped_storage().nbytes() for parameter in parameters)
            whole = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
            sys.stdout.write(json.dumps({name: [held, whole]}) + "\n")
        sys.exit(0)

    PATCH.setattr(Course, "run", counted)


def test_no_rank_holds_a_whole_child_or_teacher(case: tuple[Params, Paths]) -> None:
    """Dimensions of the tiny models are multiples of four."""
    ended = run_ranks(4, with_settings(case[0], teacher="live", ranks=4), case[1], count_weights)
    told = {
        key: value for line in ended.lines for key, value in json.loads(line).items() if key in ("child", "teacher")
    }
    assert ended.codes == [0] * 4 and told.keys() == {"child", "teacher"}
    for held, whole in told.values():
        assert held == whole / 4


def sick_rows(rank: int) -> None:
    """Have the second rank find an infinite entry in its rows of one gradient, in the second step."""
    gradients, calls = sharded.ShardedAdam.gradients, iter(range(1000))

    def computed(adam: sharded.ShardedAdam) -> dict[str, torch.Tensor]:
        rows = gradients(adam)
        if rank == 1 and next(calls) == 2:  # a step asks twice
            rows["layers.1.mlp.up_proj.weight"].view(-1)[7] = math.inf
        return rows

    PATCH.setattr(sharded.ShardedAdam, "gradients", computed)


def sick_loss(rank: int) -> None:
    """Have the second rank's KL be NaN."""

    def computed(*arguments: Any) -> Any:
        losses = backward(*arguments)
        return losses if rank == 0 else Losses(math.nan, losses.cosine, math.nan)

    PATCH.setattr(ranks, "backward", computed)


@pytest.mark.parametrize(
    ("change", "step", "message"),
    [
        (sick_rows, 2, "the gradient of layers.1.mlp.up_proj.weight is not finite"),
        (sick_loss, 1, "the loss's KL term is nan"),
    ],
)
def test_what_one_rank_finds_sick_ends_all_with_the_same_message(
    change: Any, step: int, message: str, case: tuple[Params, Paths]
) -> None:
    ended = run_ranks(2, *case, change)
    assert ended.codes == [2, 2] and len(set(ended.errors)) == 1
    assert f"step {step} of 8: {message}; lower distill_child.learning_rate" in ended.errors[0]
    saved = [path.name for path in case[1].gkd_state("small").glob("state_*")]
    assert saved == (["state_000001"] if step == 2 else []), "the weights before the sick step"
