"""distill_child: it learns, keeps the best, repeats no token, stops where it must, and resumes to the same bytes."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage.activations import BoundaryReader
from storage.checkpoints import Checkpoint, read_blocks
from storage.files import InputError
from storage.gkd import GkdCurve, read_gkd
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from tasks import distill_child
from tasks.gkd import course, threads
from tasks.puzzle.distill.extrapolation import longer_training
from tasks.puzzle.distill.gkd import Losses, LossWeights, States, TrainableChild, gradients, kl_to_parent
from tasks.puzzle.distill.optimizer import MasterWeights
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.head import Head
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import calls_of, checksums, interrupted, make_child, prepare
from tests.tiny import change_weights, flip_byte

CPU = torch.device("cpu")


def run(params: Params, paths: Paths) -> tuple[dict[str, Any], dict[str, str]]:
    """Distil; return gkd.json and the checksums of the child."""
    distill_child.distill.fn("small", params, paths)
    assert not paths.gkd_state("small").exists()
    return json.loads(paths.gkd("small").read_text(encoding="utf-8")), checksums(paths.distilled("small"))


def with_settings(params: Params, **settings: Any) -> Params:
    """Return the params with other settings of distill_child."""
    changed = params.distill_child.model_dump() | settings
    return Params.model_validate(params.model_dump(mode="json") | {"distill_child": changed})


def child_and_head(folder: Path, paths: Paths) -> tuple[TrainableChild, Head]:
    """Return a checkpoint as it trains, and the parent's head."""
    parent, checkpoint = Parent(paths.parent), Checkpoint(folder, "the test")
    config, variants = read_blocks(checkpoint)
    blocks = [Block.load(config, *v, checkpoint.block(i, CPU, torch.float32)) for i, v in enumerate(variants)]
    _, norm, lm_head = parent.outside(CPU, torch.float32)
    return TrainableChild(config, blocks, [1, 2, 3]), Head(norm, lm_head, config.rms_norm_eps)


def states(paths: Paths, split: str, sequence: int) -> States:
    """Return the parent's cached states of a sequence."""
    return lambda boundary: BoundaryReader(paths.activations, split, boundary).read([sequence])


def held_out_kl(folder: Path, paths: Paths) -> float:
    """Compute the mean KL of a checkpoint over the held-out sequences."""
    child, head = child_and_head(folder, paths)
    return fmean(kl_to_parent(child, states(paths, "calibration", sequence), head) for sequence in range(16 - 4, 16))


def test_the_child_learns_and_the_best_weights_are_published(case: tuple[Params, Paths]) -> None:
    params, paths = case
    curve, _ = run(params, paths)
    assert [row["step"] for row in curve["steps"]] == list(range(1, 9))
    assert [row["step"] for row in curve["held_out"]] == [0, 3, 6, 8]
    kls = {row["step"]: row["kl"] for row in curve["held_out"]}
    assert kls[curve["best_step"]] == min(kls.values()) < 0.9 * kls[0]
    assert held_out_kl(paths.refined("small"), paths) == pytest.approx(kls[0], rel=1e-5)
    assert held_out_kl(paths.distilled("small"), paths) == pytest.approx(min(kls.values()), rel=1e-5)
    assert curve["steps"][-1]["tokens"] == params.distill_child.tokens
    assert [row["tokens"] for row in curve["held_out"]] == [2 * SEQ_LEN * row["step"] for row in curve["held_out"]]
    card = (paths.distilled("small") / "README.md").read_text(encoding="utf-8")
    assert f"held-out KL {kls[0]:.3f} before, {min(kls.values()):.3f} after" in card
    assert "variants, corrected in closed form, then globally distilled (GKD) on" in card


def test_a_gradient_is_clipped_and_its_norm_is_shown_as_it_was(
    case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, paths = with_settings(case[0], kl_weight=2.0, cosine_weight=0.5), case[1]
    child, head = child_and_head(paths.refined("small"), paths)
    sequences = course.steps(params)[0]
    weights = LossWeights(kl=2.0, cosine=0.5)
    computed = [gradients(child, states(paths, "train", sequence), head, weights)[0] for sequence in sequences]
    flat = [torch.cat([gradient.flatten() for gradient in sequence]) for sequence in computed]
    norm = float(torch.stack(flat).mean(0).norm())
    taken: list[float] = []

    def apply(masters: MasterWeights, clipped: list[Tensor]) -> None:
        taken.append(float(torch.nn.utils.get_total_norm(clipped)))
        whole(masters, clipped)

    whole = MasterWeights.apply
    monkeypatch.setattr(MasterWeights, "apply", apply)
    curve, _ = run(with_settings(params, clip_norm=norm / 2), paths)
    assert curve["steps"][0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)  # float32, sums in another order
    by_step = [math.hypot(*layers) for layers in zip(*[iter(taken)] * len(child.layers), strict=True)]
    assert by_step == pytest.approx([min(step["gradient_norm"], norm / 2) for step in curve["steps"]], rel=1e-4)


def test_checkpoints_take_no_more_than_a_tenth_of_the_time(
    case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which each of the four held-out sequences takes 5 s, and a checkpoint 5 s."""
    clock, saved = SimpleNamespace(now=0.0), list[float]()

    def measure(*arguments: Any) -> float:
        clock.now += 5
        return kl_to_parent(*arguments)

    def save(*arguments: Any) -> None:
        saved.append(clock.now)
        clock.now += 5
        save_file(*arguments)

    monkeypatch.setattr(course, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(threads, "kl_to_parent", measure)
    monkeypatch.setattr(threads, "save_file", save)
    run(with_settings(case[0], checkpoint_steps=1), case[1])
    assert saved == [40, 105, 170]  # behind steps 1, 4 and 7 of 8


def test_the_curve_is_carried_on_to_ten_times_the_tokens(case: tuple[Params, Paths]) -> None:
    curve, _ = run(with_settings(case[0], checkpoint_steps=1), case[1])
    carried_on = longer_training([(row["tokens"], row["kl"]) for row in curve["held_out"]], 10)
    assert carried_on is not None and curve["modelled"] == asdict(carried_on)


def test_a_measurement_is_shown_with_the_step_before_it(case: tuple[Params, Paths]) -> None:
    params, paths = case
    shown: list[distill_child.Measurement] = []
    distill_child.distill.fn("small", params, paths, shown.append)
    curve = json.loads(paths.gkd("small").read_text(encoding="utf-8"))
    kls = {row["step"]: row["kl"] for row in curve["held_out"]}
    assert [(seen.step, seen.num_steps, seen.kl) for seen in shown] == [(step, 8, kls[step]) for step in (3, 6, 8)]
    for seen in shown:
        step = curve["steps"][seen.step - 1]
        assert (seen.loss, seen.gradient_norm) == (step["loss"], step["gradient_norm"])
        assert seen.seconds_left * seen.tokens_per_s == pytest.approx((8 - seen.step) * 2 * SEQ_LEN)


def test_what_is_not_in_blocks_stays_the_parents(case: tuple[Params, Paths]) -> None:
    params, paths = case
    run(params, paths)
    before, after = (Checkpoint(folder, "") for folder in (paths.refined("small"), paths.distilled("small")))
    assert before.checksums.keys() == after.checksums.keys()
    changed = {name for name in before.checksums if before.checksums[name] != after.checksums[name]}
    assert changed == {name for name in before.checksums if name.startswith("model.layers.")}


@pytest.mark.parametrize("refined_tokens", [0, 24 * SEQ_LEN])
def test_without_tokens_the_child_stays_as_it_was(refined_tokens: int, case: tuple[Params, Paths]) -> None:
    """No activation is read; an earlier training's checkpoint goes."""
    params, paths = with_settings(case[0], tokens=0), case[1]
    refine_child = params.refine_child.model_copy(update={"tokens": refined_tokens})
    interrupt(case, 13)
    shutil.rmtree(paths.activations)
    curve, _ = run(params.model_copy(update={"refine_child": refine_child}), paths)
    before, after = (Checkpoint(folder, "") for folder in (paths.refined("small"), paths.distilled("small")))
    assert before.checksums == after.checksums
    assert read_gkd("small", paths) == GkdCurve("small", (), (), 0) and curve["modelled"] is None
    card = (paths.distilled("small") / "README.md").read_text(encoding="utf-8")
    corrected = "corrected in closed form, " if refined_tokens else ""
    assert f"assembled from blockwise distilled variants, {corrected}not globally distilled (no GKD)." in card


@pytest.mark.parametrize(
    "sections", [{}, {"refine_child": {"tokens": 40 * SEQ_LEN}, "distill_child": {"tokens": 8 * SEQ_LEN}}]
)
def test_no_token_is_used_twice_nor_was_by_bld_or_the_correction(sections: dict[str, Any]) -> None:
    params = tiny_params(**sections)
    used = [sequence for group in course.steps(params) for sequence in group]
    assert len(used) == len(set(used)) == params.distill_child.tokens // SEQ_LEN
    assert min(used) >= max(params.distill_blocks.used_tokens, params.refine_child.tokens) // SEQ_LEN
    assert max(used) < params.prepare_corpus.train_tokens // SEQ_LEN
    assert course.steps(tiny_params(**sections, run={"seed": 1})) != course.steps(params)


def test_workers_change_no_byte(case: tuple[Params, Paths]) -> None:
    params, paths = case
    alone = run(params, paths)
    assert run(tiny_params(run={"workers": 3}, prepare_parent=params.prepare_parent.model_dump()), paths) == alone


@pytest.mark.parametrize(("keep", "held"), [([], 1), ([1], 2)])
def test_a_rolling_cache_holds_the_child_to_what_it_keeps(
    keep: list[int], held: int, child: tuple[Params, Paths], tmp_path: Path
) -> None:
    """The KL is the same; the cosine loss of the first step is a mean over fewer blocks."""
    rolling = {"mode": "rolling", "keep": keep}
    params, paths = prepare("llama", tmp_path, cache_activations=rolling, distill_child={"teacher": "cache"})
    make_child(params, paths)
    curve, _ = run(params, paths)
    shutil.copytree(child[1].root, tmp_path / "materialised")
    whole, _ = run(child[0], Paths(tmp_path / "materialised"))
    assert len(list((paths.activations / "train").iterdir())) == held + 1
    assert curve["held_out"][0] == whole["held_out"][0]
    assert curve["steps"][0]["kl"] == whole["steps"][0]["kl"]
    assert curve["steps"][0]["cosine"] != whole["steps"][0]["cosine"]
    assert min(row["kl"] for row in curve["held_out"]) < curve["held_out"][0]["kl"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_a_live_teacher_teaches_what_the_cache_holds(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """Up to the rounding of the cache: bfloat16 keeps 8 bits, 0.4 % of each hidden state; live ones are not rounded."""
    losses = {}
    for teacher in ("cache", "live"):
        root, settings = tmp_path / teacher, {"teacher": teacher, "tokens": 2 * SEQ_LEN}
        params, paths = prepare("llama", root, cache_activations={"dtype": dtype}, distill_child=settings)
        shards = make_child(params, paths)
        assert ("train.shard_003" in shards) == (teacher == "cache"), "BLD reads 32 of 48 sequences, 12 a shard"
        losses[teacher] = run(params, paths)[0]["steps"][0]
    for term in ("kl", "cosine", "gradient_norm"):
        assert losses["live"][term] == pytest.approx(losses["cache"][term], rel=tolerance), term
    assert (losses["live"] == losses["cache"]) == (dtype == "float32")


def test_a_rolling_cache_without_the_boundaries_of_the_cosine_loss_has_a_live_teacher(
    child: tuple[Params, Paths], tmp_path: Path
) -> None:
    params, paths = prepare("llama", tmp_path, cache_activations={"mode": "rolling"})
    make_child(params, paths)
    live, _ = run(params, paths)
    shutil.copytree(child[1].root, tmp_path / "materialised")
    cached, _ = run(child[0], Paths(tmp_path / "materialised"))
    assert live["steps"][-1] == pytest.approx(cached["steps"][-1], rel=1e-4)  # the cache is float32 here


def sick_gradients(at: int, sick: str, names: list[str]) -> Any:
    """Return `gradients`, whose `at`-th call (from 1) finds what is not finite: a term of the loss, or a weight's."""
    calls = iter(range(1, 1000))

    def computed(*arguments: Any) -> tuple[list[Tensor], Losses]:
        tensors, losses = gradients(*arguments)
        if next(calls) == at:
            if sick in names:
                tensors[names.index(sick)].view(-1)[7] = math.inf
            else:
                losses = Losses(**{"kl": losses.kl, "cosine": losses.cosine, "total": math.nan} | {sick: math.nan})
        return tensors, losses

    return computed


@pytest.mark.parametrize("sick", ["kl", "cosine", "layers.1.mlp.up_proj.weight"])
def test_a_step_that_is_not_finite_stops_the_training(
    sick: str, case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN at step 2: the weights of step 1 stay in the checkpoint, nothing is published, and a rerun stops as well."""
    params, paths = case
    names = [name for name, _ in child_and_head(paths.refined("small"), paths)[0].named_parameters()]
    shown = {"kl": "the loss's KL term is nan", "cosine": "the loss's cosine term is nan"}
    message = rf"step 2 of 8: {shown.get(sick, f'the gradient of {sick} is not finite')}; lower distill_child.learning"
    for at in (4, 2):  # two sequences a step; the rerun begins with step 2
        with monkeypatch.context() as patch, pytest.raises(InputError, match=message) as stopped:
            patch.setattr(threads, "gradients", sick_gradients(at, sick, names))
            distill_child.distill.fn("small", params, paths)
        assert stopped.value.exit_code == 2
        [path] = paths.gkd_state("small").glob("*.safetensors")
        assert path.name == "state_000001.safetensors"
    assert not paths.distilled("small").exists() and not paths.gkd("small").exists()
    saved = load_file(path)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert [name for name in names if not torch.equal(saved[f"master.{name}"], saved[f"best.{name}"])] == names


def test_a_held_out_kl_that_is_not_finite_stops_the_training(
    case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last step too, and again in a run that goes on from the checkpoint of step 6."""
    for earlier in (3, 0):
        measured = iter([0.5] * (4 * earlier))
        with monkeypatch.context() as patch:
            patch.setattr(threads, "kl_to_parent", lambda *_, left=measured: next(left, math.nan))
            with pytest.raises(InputError, match="step 8 of 8: the held-out KL behind it is nan"):
                distill_child.distill.fn("small", *case)
    assert not case[1].distilled("small").exists()


def interrupt(case: tuple[Params, Paths], after: int) -> None:
    """Distil until gradients were computed `after` times."""
    with interrupted(threads, "gradients", after):
        distill_child.distill.fn("small", *case)


@pytest.mark.parametrize("after", [3, 7, 13])
def test_an_interrupted_run_ends_with_the_same_bytes(
    after: int, case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(*case)
    interrupt(case, after)
    assert checksums(case[1].distilled("small")) == whole[1]  # the earlier child stays until the new one is whole
    computed = calls_of(threads, "gradients", monkeypatch)
    assert run(*case) == whole
    assert len(computed) == 16 - 6 * (after // 6), "what the checkpoint holds is not computed again"


def test_a_damaged_checkpoint_is_not_taken(case: tuple[Params, Paths]) -> None:
    whole = run(*case)
    interrupt(case, 13)
    [state] = case[1].gkd_state("small").glob("*.safetensors")
    flip_byte(state, -100)
    assert run(*case) == whole


@pytest.mark.parametrize("other", ["weights", "dtype", "rate", "code"])
def test_a_checkpoint_of_another_training_is_not_taken(
    other: str, case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, paths = case
    interrupt(case, 13)
    if other == "weights":
        change_weights(paths.refined("small"))
    elif other == "dtype":
        params = tiny_params(run={"dtype": "bfloat16"}, prepare_parent=params.prepare_parent.model_dump())
    elif other == "rate":
        params = with_settings(params, learning_rate=2e-3)
    else:
        monkeypatch.setattr(threads, "code_digest", lambda *_: "of other code")
    computed = calls_of(threads, "gradients", monkeypatch)
    run(params, paths)
    assert len(computed) == 16


@pytest.mark.parametrize(("patience", "measured"), [(0, [0, 3, 6, 8]), (2, [0, 3, 6]), (1, [0, 3])])
def test_a_rate_at_which_it_diverges_keeps_the_weights_that_it_began_with(
    patience: int, measured: list[int], case: tuple[Params, Paths]
) -> None:
    """With patience it stops after so many measurements, and after an interruption as well."""
    params, paths = case
    diverging = with_settings(params, learning_rate=1.0, warmup=0.0, patience=patience), paths
    curve, _ = whole = run(*diverging)
    assert curve["best_step"] == 0
    assert [row["step"] for row in curve["held_out"]] == measured
    interrupt(diverging, 2 * measured[-1] - 1)
    assert run(*diverging) == whole  # the best weights, here of before the interruption, come from the checkpoint
    before, after = (Checkpoint(folder, "") for folder in (paths.refined("small"), paths.distilled("small")))
    assert before.checksums == after.checksums


def test_a_training_that_stopped_early_stays_stopped(
    case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last measurement and the new child."""
    diverging = with_settings(case[0], learning_rate=1.0, warmup=0.0, patience=1), case[1]
    whole = run(*diverging)
    with interrupted(distill_child, "publish", 0):
        distill_child.distill.fn("small", *diverging)
    computed = calls_of(threads, "gradients", monkeypatch)
    assert run(*diverging) == whole
    assert not computed
