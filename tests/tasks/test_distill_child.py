"""distill_child: it learns, keeps the best, repeats no token, and resumes to the same bytes."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from storage.activations import BoundaryReader
from storage.checkpoints import Checkpoint, read_blocks
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from tasks import distill_child
from tasks.puzzle.distill.gkd import States, TrainableChild, gradients, kl_to_parent
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.head import Head
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import assemble, cache, checksums, distill, prepare
from tests.tiny import flip_byte

CPU = torch.device("cpu")
CHILD = [("kv_1", "ffn_48"), ("no_op", "ffn_24"), ("kv_2", "no_op")]


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    """A child assembled from a trained library."""
    params, paths = prepare("llama", tmp_path_factory.mktemp("assembled"))
    cache(params, paths)
    distill(params, paths)
    assemble(params, paths, CHILD)
    return params, paths


@pytest.fixture
def case(assembled: tuple[Params, Paths], tmp_path: Path) -> tuple[Params, Paths]:
    """A copy of the assembled child, which the test may change."""
    shutil.copytree(assembled[1].root, tmp_path / "artifacts")
    return assembled[0], Paths(tmp_path / "artifacts")


def run(params: Params, paths: Paths) -> tuple[dict[str, Any], dict[str, str]]:
    """Distil; gkd.json and the checksums of the child."""
    distill_child.distill.fn("small", params, paths)
    assert not paths.gkd_state("small").exists()
    return json.loads(paths.gkd("small").read_text(encoding="utf-8")), checksums(paths.distilled("small"))


def held_out_kl(folder: Path, paths: Paths) -> float:
    """Mean KL of a checkpoint over the held-out sequences."""
    parent, checkpoint = Parent(paths.parent), Checkpoint(folder, "the test")
    config, variants = read_blocks(checkpoint)
    blocks = [Block.load(config, *v, checkpoint.block(i, CPU, torch.float32)) for i, v in enumerate(variants)]
    child = TrainableChild(config, blocks, [1, 2, 3])
    _, norm, lm_head = parent.outside(CPU, torch.float32)
    head = Head(norm, lm_head, config.rms_norm_eps)

    def states(sequence: int) -> States:
        return lambda boundary: BoundaryReader(paths.activations, "calibration", boundary).read([sequence])

    return fmean(kl_to_parent(child, states(sequence), head) for sequence in range(16 - 4, 16))


def test_the_child_learns_and_the_best_weights_are_published(case: tuple[Params, Paths]) -> None:
    params, paths = case
    curve, _ = run(params, paths)
    assert [row["step"] for row in curve["steps"]] == list(range(1, 9))
    assert [row["step"] for row in curve["held_out"]] == [0, 3, 6, 8]
    kls = {row["step"]: row["kl"] for row in curve["held_out"]}
    assert kls[curve["best_step"]] == min(kls.values()) < 0.9 * kls[0]
    assert held_out_kl(paths.assembled("small"), paths) == pytest.approx(kls[0], rel=1e-5)
    assert held_out_kl(paths.distilled("small"), paths) == pytest.approx(min(kls.values()), rel=1e-5)
    assert curve["steps"][-1]["tokens"] == params.distill_child.tokens
    card = (paths.distilled("small") / "README.md").read_text(encoding="utf-8")
    assert f"held-out KL {kls[0]:.3f} before, {min(kls.values()):.3f} after" in card


def test_what_is_not_in_blocks_stays_the_parents(case: tuple[Params, Paths]) -> None:
    params, paths = case
    run(params, paths)
    before, after = (Checkpoint(folder, "") for folder in (paths.assembled("small"), paths.distilled("small")))
    assert before.checksums.keys() == after.checksums.keys()
    changed = {name for name in before.checksums if before.checksums[name] != after.checksums[name]}
    assert changed == {name for name in before.checksums if name.startswith("model.layers.")}


def test_no_token_is_used_twice_nor_was_by_bld(case: tuple[Params, Paths]) -> None:
    params, _ = case
    used = [sequence for group in distill_child._steps(params) for sequence in group]
    assert len(used) == len(set(used)) == params.distill_child.tokens // SEQ_LEN
    assert min(used) >= params.distill_blocks.used_tokens // SEQ_LEN
    assert max(used) < params.prepare_corpus.train_tokens // SEQ_LEN


def test_workers_change_no_byte(case: tuple[Params, Paths]) -> None:
    params, paths = case
    alone = run(params, paths)
    assert run(tiny_params(run={"workers": 3}, prepare_parent=params.prepare_parent.model_dump()), paths) == alone


@pytest.mark.parametrize(("keep", "held"), [([], 1), ([1], 2)])
def test_a_rolling_cache_holds_the_child_to_what_it_keeps(
    keep: list[int], held: int, assembled: tuple[Params, Paths], tmp_path: Path
) -> None:
    """The KL is the same; the cosine loss of the first step is a mean over fewer blocks."""
    params, paths = prepare("llama", tmp_path, cache_activations={"mode": "rolling", "keep": keep})
    cache(params, paths)
    distill(params, paths)
    assemble(params, paths, CHILD)
    curve, _ = run(params, paths)
    shutil.copytree(assembled[1].root, tmp_path / "materialised")
    whole, _ = run(assembled[0], Paths(tmp_path / "materialised"))
    assert len(list((paths.activations / "train").iterdir())) == held + 1
    assert curve["held_out"][0] == whole["held_out"][0]
    assert curve["steps"][0]["kl"] == whole["steps"][0]["kl"]
    assert curve["steps"][0]["cosine"] != whole["steps"][0]["cosine"]
    assert min(row["kl"] for row in curve["held_out"]) < curve["held_out"][0]["kl"]


def interrupt(case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Distil until gradients were computed `after` times."""
    calls = iter(range(after))

    def failing(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return gradients(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill_child, "gradients", failing)
        distill_child.distill.fn("small", *case)


@pytest.mark.parametrize("after", [3, 7, 13])
def test_an_interrupted_run_ends_with_the_same_bytes(
    after: int, case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(*case)
    interrupt(case, monkeypatch, after)
    assert checksums(case[1].distilled("small")) == whole[1]  # the earlier child stays until the new one is whole
    computed = []

    def counting(*arguments: Any) -> Any:
        computed.append(1)
        return gradients(*arguments)

    monkeypatch.setattr(distill_child, "gradients", counting)
    assert run(*case) == whole
    assert len(computed) == 16 - 6 * (after // 6), "what the checkpoint holds is not computed again"


def test_a_damaged_checkpoint_is_not_taken(case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(*case)
    interrupt(case, monkeypatch, 13)
    [state] = case[1].gkd_state("small").glob("*.safetensors")
    flip_byte(state, -100)
    assert run(*case) == whole


def test_a_rate_at_which_it_diverges_keeps_the_assembled_weights(
    case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, paths = case
    values = params.model_dump(mode="json")
    values["distill_child"] |= {"learning_rate": 1.0, "warmup": 0.0}
    diverging = Params.model_validate(values), paths
    curve, _ = whole = run(*diverging)
    assert curve["best_step"] == 0
    interrupt(diverging, monkeypatch, 13)
    assert run(*diverging) == whole  # the best weights, here of before the interruption, come from the checkpoint
    before, after = (Checkpoint(folder, "") for folder in (paths.assembled("small"), paths.distilled("small")))
    assert before.checksums == after.checksums
