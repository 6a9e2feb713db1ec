"""refine_child: errors fall, kept blocks stay, and the bytes are the same for workers, kills and a rolling cache."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.activations import BoundaryReader
from storage.checkpoints import Checkpoint, read_blocks
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.refinement import BlockRefinement, Refinement, read_refinement
from storage.variants import Attention, Ffn, Replacement
from tasks import refine_child
from tasks.puzzle.distill.correction import correct, relative_error
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.rotary import rotary_for
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import assemble, assemble_blocks, cache, calls_of, checksums, distill, interrupted, prepare
from tests.tiny import change_weights, flip_byte

CPU = torch.device("cpu")
CHILD = [("kv_2", "ffn_96"), ("no_op", "ffn_48"), ("kv_1", "no_op")]
"""Its first block is the parent's."""


@pytest.fixture
def case(finished: tuple[Params, Paths]) -> tuple[Params, Paths]:
    """Assemble a child from a trained library."""
    assemble(*finished, CHILD)
    return finished


def run(params: Params, paths: Paths) -> tuple[Refinement, dict[str, str]]:
    """Correct; return refine.json and the checksums of the child."""
    refine_child.refine.fn("small", params, paths)
    assert not paths.refine_state("small").exists() and not paths.rolling.exists()
    return read_refinement("small", paths), checksums(paths.refined("small"))


def errors_along_depth(folder: Path, replacements: list[Replacement], paths: Paths) -> list[float]:
    """Compute a checkpoint's errors behind each block on the last 4 calibration sequences, in one batch."""
    checkpoint = Checkpoint(folder, "the test")
    config, variants = read_blocks(checkpoint)

    def states(boundary: int) -> torch.Tensor:
        return BoundaryReader(paths.activations, "calibration", boundary).read(range(12, 16))

    hidden, errors = states(0), []
    for index, (variant, replacement) in enumerate(zip(variants, replacements, strict=True)):
        block = Block.load(config, *variant, checkpoint.block(index, CPU, torch.float32))
        hidden = block(hidden, rotary_for(config, SEQ_LEN, hidden))
        errors.append(relative_error(hidden, states(replacement.parent_blocks.stop)))
    return errors


def test_the_error_along_depth_is_what_the_checkpoints_have(case: tuple[Params, Paths]) -> None:
    refinement, _ = run(*case)
    blocks = [Replacement(index, 1, *pair) for index, pair in enumerate(_variants(CHILD))]
    for name, folder in (("error_assembled", case[1].assembled("small")), ("error_refined", case[1].refined("small"))):
        recorded = [getattr(block, name) for block in refinement.blocks]
        assert recorded == pytest.approx(errors_along_depth(folder, blocks, case[1]), rel=1e-4, abs=1e-9)
    assert refinement.blocks[-1].error_refined < 0.98 * refinement.blocks[-1].error_assembled
    assert (refinement.tokens, refinement.held_out_tokens) == (24 * SEQ_LEN, 4 * SEQ_LEN)
    card = (case[1].refined("small") / "README.md").read_text(encoding="utf-8")
    last = refinement.blocks[-1]
    assert f"hidden states {last.error_assembled:.3f} before, {last.error_refined:.3f} after" in card


def _variants(names: list[tuple[str, str]]) -> Iterator[tuple[Attention, Ffn]]:
    return ((Attention.parse(attention), Ffn.parse(ffn)) for attention, ffn in names)


def test_a_kept_first_block_has_residual_zero_and_stays(case: tuple[Params, Paths]) -> None:
    refinement, _ = run(*case)
    assert refinement.blocks[0] == BlockRefinement(0, 1, (), 0.0, 0.0)
    before, after = (Checkpoint(folder, "") for folder in (case[1].assembled("small"), case[1].refined("small")))
    parent = Parent(case[1].parent).checkpoint
    changed = {name for name in before.checksums if before.checksums[name] != after.checksums[name]}
    assert changed == {"model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"}
    assert parent.block_digest(0) == after.block_digest(0)


def test_a_child_that_is_the_parent_stays_it(case: tuple[Params, Paths]) -> None:
    params, paths = case
    assemble(params, paths, [("kv_2", "ffn_96")] * 3)
    refinement, _ = run(params, paths)
    assert all(block.error_refined == 0 for block in refinement.blocks)
    assert Checkpoint(paths.refined("small"), "").checksums == Checkpoint(paths.assembled("small"), "").checksums


SPANS = [
    Replacement(0, 1, Attention("linear"), Ffn("linear")),
    Replacement(1, 2, Attention("gqa", 1), Ffn("gated", 48)),
]


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("llama3-untied-head_dim-bias", [("kv_1", "linear"), ("linear", "ffn_48"), ("kv_2", "ffn_96")]),
        ("qwen2", [("linear", "no_op"), ("no_op", "linear"), ("no_op", "no_op")]),
        ("llama", SPANS),
        ("llama", [Replacement(0, 2, Attention("gqa", 2), Ffn("no_op")), Replacement(2, 1, *next(_variants(CHILD)))]),
    ],
)
def test_no_held_out_error_rises_whatever_the_blocks_are(
    family: str, blocks: list[Replacement | tuple[str, str]], tmp_path: Path
) -> None:
    """Biases, linear layers, spans, no-ops, and the parent's own blocks behind others."""
    params, paths = prepare(family, tmp_path, distill_blocks={"linear": True, "spans": [2]})
    cache(params, paths)
    distill(params, paths)
    replacements = [
        block if isinstance(block, Replacement) else Replacement(index, 1, *next(_variants([block])))
        for index, block in enumerate(blocks)
    ]
    assemble_blocks(params, paths, replacements)
    refinement, _ = run(params, paths)
    corrections = [subblock for block in refinement.blocks for subblock in block.subblocks]
    assert all(correction.error_after <= correction.error_before for correction in corrections)
    assert any(correction.ridge for correction in corrections)
    recorded = [block.error_refined for block in refinement.blocks]
    assert recorded == pytest.approx(errors_along_depth(paths.refined("small"), replacements, paths), rel=1e-4)
    assert recorded[-1] < refinement.blocks[-1].error_assembled


def test_the_first_train_and_the_last_calibration_sequences_are_taken() -> None:
    """Those behind them are GKD's, and those before them are scored."""
    assert refine_child._sequences(tiny_params()) == {"train": range(24), "calibration": range(12, 16)}


def test_workers_change_no_byte(case: tuple[Params, Paths]) -> None:
    alone = run(*case)
    params = tiny_params(run={"workers": 3}, prepare_parent=case[0].prepare_parent.model_dump())
    assert run(params, case[1]) == alone


def test_a_rolling_cache_gives_the_same_bytes(case: tuple[Params, Paths], tmp_path: Path) -> None:
    params, paths = prepare("llama", tmp_path / "rolling", cache_activations={"mode": "rolling"})
    cache(params, paths)
    distill(params, paths)
    assemble(params, paths, CHILD)
    rolling, _ = run(params, paths)
    assert run(*case)[0] == rolling
    weights = [Checkpoint(folder.refined("small"), "").checksums for folder in (paths, case[1])]
    assert weights[0] == weights[1]


def interrupt(case: tuple[Params, Paths], after: int) -> None:
    """Correct until `after` subblocks were corrected."""
    with interrupted(refine_child, "correct", after):
        refine_child.refine.fn("small", *case)


DEEPER = [("kv_1", "ffn_48"), ("no_op", "ffn_48"), ("kv_1", "ffn_24")]
"""Five subblocks to correct."""


@pytest.fixture
def deeper(case: tuple[Params, Paths]) -> tuple[Params, Paths]:
    """Return a child that is corrected from its first block on."""
    assemble(*case, DEEPER)
    return case


@pytest.mark.parametrize(("after", "left"), [(1, 5), (2, 3), (4, 2)])
def test_an_interrupted_walk_ends_with_the_same_bytes(
    after: int, left: int, deeper: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished blocks are not corrected again, and one block's states are on disk at a time."""
    whole = run(*deeper)
    interrupt(deeper, after)
    assert checksums(deeper[1].refined("small")) == whole[1]  # the earlier child stays until the new one is whole
    states = deeper[1].refine_state("small") / "states"
    shutil.copytree(next(states.iterdir()), states / "009")  # left by a kill before it was deleted
    calls: list[list[str]] = []

    def counting(*arguments: Any) -> Any:
        calls.append([folder.name for folder in states.iterdir()])
        return correct(*arguments)

    monkeypatch.setattr(refine_child, "correct", counting)
    assert run(*deeper) == whole
    assert len(calls) == left and all(len(folders) == 1 for folders in calls)


def test_a_rolling_cache_whose_states_were_lost_begins_at_the_first_block(tmp_path: Path) -> None:
    """The boundary that it begins with is no longer in the window."""
    case = prepare("llama", tmp_path, cache_activations={"mode": "rolling"})
    cache(*case)
    distill(*case)
    assemble(*case, DEEPER)
    whole = run(*case)
    interrupt(case, 4)
    shutil.rmtree(case[1].refine_state("small") / "states")
    assert run(*case) == whole


@pytest.mark.parametrize("damaged", ["states", "blocks"])
def test_damaged_pieces_are_made_again(damaged: str, deeper: tuple[Params, Paths]) -> None:
    whole = run(*deeper)
    interrupt(deeper, 4)
    files = [
        path
        for path in (deeper[1].refine_state("small") / damaged).rglob("*")
        if path.suffix in (".arrow", ".safetensors")
    ]
    flip_byte(sorted(files)[0], -100)
    assert run(*deeper) == whole


def test_another_setting_starts_anew(deeper: tuple[Params, Paths]) -> None:
    """Also where the sequences lie in the same shards of the activation cache."""
    values = deeper[0].model_dump(mode="json")
    values["refine_child"]["tokens"] = 20 * SEQ_LEN
    fewer = Params.model_validate(values)
    undisturbed = run(fewer, deeper[1])
    interrupt(deeper, 4)
    assert run(fewer, deeper[1]) == undisturbed


@pytest.mark.parametrize("other", ["weights", "dtype", "code"])
def test_blocks_that_were_corrected_from_other_inputs_are_not_taken(
    other: str, deeper: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, paths = deeper
    interrupt(deeper, 4)
    if other == "weights":
        change_weights(paths.assembled("small"))
    elif other == "dtype":
        params = tiny_params(run={"dtype": "bfloat16"}, prepare_parent=params.prepare_parent.model_dump())
    else:
        monkeypatch.setattr(refine_child, "code_digest", lambda _: "of other code")
    corrected = calls_of(refine_child, "correct", monkeypatch)
    run(params, paths)
    assert len(corrected) == 5


def test_without_tokens_the_child_stays_as_assembled(case: tuple[Params, Paths]) -> None:
    values = case[0].model_dump(mode="json")
    values["refine_child"]["tokens"] = 0
    refinement, _ = run(Params.model_validate(values), case[1])
    assert refinement.blocks == ()
    assert Checkpoint(case[1].refined("small"), "").checksums == Checkpoint(case[1].assembled("small"), "").checksums


def test_sums_are_over_every_sequence_once_also_where_a_group_is_not_full(
    case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """22 sequences are five groups of four and one of two; one by one they have the same sums."""
    corrected = calls_of(refine_child, "correct", monkeypatch)
    settings = case[0].refine_child.model_copy(update={"tokens": 22 * SEQ_LEN})
    params = case[0].model_copy(update={"refine_child": settings})
    run(params, case[1])
    monkeypatch.setattr(refine_child, "_GROUP", 1)
    monkeypatch.setattr(refine_child, "code_digest", lambda _: "one by one")
    run(params, case[1])
    grouped, single = corrected[0][2], corrected[len(corrected) // 2][2]
    assert float(grouped.target) == pytest.approx(float(single.target), rel=1e-6)
    assert grouped.gram.allclose(single.gram, rtol=1e-4, atol=1e-5 * float(single.gram.max()))
    assert grouped.cross.allclose(single.cross, rtol=1e-3, atol=1e-4 * float(single.cross.abs().max()))
