"""cache_activations: the cache holds what transformers computes, and only missing shards are planned."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.activations import BoundaryReader, shard_path
from storage.corpus import read_sequences
from storage.files import DamagedFileError, InputError
from storage.params import Params
from storage.paths import Paths
from storage.pieces import Pieces
from tasks.cache_activations import _shards_at_once, cache_shards, grouped, plan_shards
from tasks.prepare_parent import prepare_parent
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import cache, checksums, prepare
from tests.tiny import FAMILIES, SIZES, flip_byte, save_tiny, save_tokenizer, tiny_corpus, tiny_model

ALL_SHARDS = [f"train.shard_{i:03d}" for i in range(4)] + [f"calibration.shard_{i:03d}" for i in range(2)]
ALL_SHARDS += ["validation.shard_000"]


@pytest.mark.parametrize("family", FAMILIES)
def test_boundaries_are_the_hidden_states_of_transformers(family: str, tmp_path: Path) -> None:
    params, paths = prepare(family, tmp_path)
    assert cache(params, paths) == ALL_SHARDS
    model, last = tiny_model(family), SIZES["num_hidden_layers"]
    for split in ("train", "calibration"):
        sequences = [13, 0, 11, 12]  # across two shards of 12
        tokens = torch.from_numpy(read_sequences(paths.corpus, split)[sequences]).long()
        with torch.no_grad():
            expected = list(model(tokens, output_hidden_states=True).hidden_states)
        for boundary in range(last):
            cached = BoundaryReader(paths.activations, split, boundary).read(sequences)
            torch.testing.assert_close(cached, expected[boundary], atol=1e-5, rtol=1e-5)  # float32, other batches
        cached = model.model.norm(BoundaryReader(paths.activations, split, last).read(sequences))
        torch.testing.assert_close(cached, expected[last], atol=1e-5, rtol=1e-5)  # transformers' last one is normalised


def test_validation_keeps_the_last_boundary_only(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    assert [path.name for path in sorted((paths.activations / "validation").iterdir())] == ["boundary_003"]


def test_only_what_a_killed_run_left_undone_is_planned(tmp_path: Path) -> None:
    params, paths = prepare("llama", tmp_path)
    shards = plan_shards.fn(params, paths)
    for shard in shards[:2]:
        cache_shards.fn([shard], params, paths)
    half_written = shard_path(paths.activations, "train", 0, 2)
    half_written.write_bytes(b"killed here, before its record")
    assert [shard.name for shard in plan_shards.fn(params, paths)] == ALL_SHARDS[2:]
    assert not half_written.exists()
    assert cache(params, paths) == ALL_SHARDS[2:]
    assert cache(params, paths) == []


def test_two_runs_give_the_same_bytes(finished: tuple[Params, Paths], tmp_path: Path) -> None:
    _, paths = finished
    other_params, other_paths = prepare("llama", tmp_path / "again")
    for shard in reversed(plan_shards.fn(other_params, other_paths)):
        cache_shards.fn([shard], other_params, other_paths)
    assert checksums(paths.activations) == checksums(other_paths.activations)


def test_shards_that_go_through_the_parent_together_are_the_same_bytes(
    finished: tuple[Params, Paths], tmp_path: Path
) -> None:
    _, paths = finished
    other_params, other_paths = prepare("llama", tmp_path / "together")
    cache_shards.fn(plan_shards.fn(other_params, other_paths), other_params, other_paths)
    assert checksums(paths.activations) == checksums(other_paths.activations)


def test_a_gpu_takes_as_many_shards_as_a_quarter_of_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.cache_activations.gpu_bytes", lambda _: 64_000)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [_shards_at_once(gpu, size, 2) for size in (1_000, 4_000, 100_000)] == [8, 2, 1]
    assert _shards_at_once(cpu, 1, 2) == 1


def test_a_machine_without_a_gpu_plans_for_nodes_that_have_one(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    shards = plan_shards.fn(tiny_params(run={"seed": 1, "threads": 2}), paths)
    on_nodes = params.model_copy(update={"run": params.run.model_copy(update={"device": "cuda"})})
    assert grouped(shards, on_nodes, paths) == [shards]


def test_a_flipped_byte_is_found_by_the_reader_and_made_anew(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    damaged = shard_path(paths.activations, "calibration", 2, 1)
    whole = checksums(paths.activations)
    flip_byte(damaged, 1000)
    assert BoundaryReader(paths.activations, "calibration", 2).read([0]).shape == (1, SEQ_LEN, SIZES["hidden_size"])
    with pytest.raises(DamagedFileError, match=r"boundary_002/shard_001.*dvc repro cache_activations"):
        BoundaryReader(paths.activations, "calibration", 2).read([0, 12])
    assert cache(params, paths) == ["calibration.shard_001"]
    assert checksums(paths.activations) == whole


def test_more_tokens_make_only_the_shards_that_they_change(finished: tuple[Params, Paths]) -> None:
    params, paths = finished
    tiny_corpus(paths.corpus, SIZES["vocab_size"], SEQ_LEN, sequences=(44, 16, 8))
    assert cache(params, paths) == ["train.shard_003"]
    tiny_corpus(paths.corpus, SIZES["vocab_size"], SEQ_LEN, sequences=(52, 16, 8))
    assert cache(params, paths) == ["train.shard_003", "train.shard_004"], "shard 3 was not full"


def test_the_same_tokens_in_longer_sequences_are_cached_anew(finished: tuple[Params, Paths]) -> None:
    """A split's ids are one stream, so that a shard may hold the same bytes in another shape."""
    _, paths = finished
    before = read_sequences(paths.corpus, "validation").tobytes()
    tiny_corpus(paths.corpus, SIZES["vocab_size"], 2 * SEQ_LEN, sequences=(24, 8, 4))
    assert read_sequences(paths.corpus, "validation").tobytes() == before
    shards = plan_shards.fn(
        tiny_params(prepare_corpus={"seq_len": 2 * SEQ_LEN}, score_blocks={"initial_tokens": 0}), paths
    )
    assert [shard.name for shard in shards] == ["train.shard_000", "train.shard_001", *ALL_SHARDS[4:5], ALL_SHARDS[-1]]


@pytest.mark.parametrize(
    "overrides",
    [{"run": {"dtype": "bfloat16"}}, {"run": {"threads": 2}}, {"cache_activations": {"sequences_per_batch": 2}}],
)
def test_what_changes_bytes_makes_all_shards_anew(
    overrides: dict[str, dict[str, object]], finished: tuple[Params, Paths]
) -> None:
    _, paths = finished
    assert [shard.name for shard in plan_shards.fn(tiny_params(**overrides), paths)] == ALL_SHARDS
    assert Pieces(paths.activations, "the test").names() == []


@pytest.mark.parametrize(
    "overrides",
    [{"run": {"workers": 2}}, {"run": {"seed": 3}}, {"distill_blocks": {"learning_rate": 0.1}}],
)
def test_what_does_not_change_bytes_makes_nothing_anew(
    overrides: dict[str, dict[str, object]], finished: tuple[Params, Paths]
) -> None:
    _, paths = finished
    assert plan_shards.fn(tiny_params(**overrides), paths) == []


def test_weights_that_overflow_end_the_first_stage_that_computes(tmp_path: Path) -> None:
    """All weights are finite; the states were NaN up to the scores, hours later."""
    save_tiny("llama", tmp_path / "source")
    for file in (tmp_path / "source").glob("*.safetensors"):
        huge = {name: tensor * (1e30 if "mlp" in name else 1) for name, tensor in load_file(file).items()}
        save_file(huge, file, {"format": "pt"})
    save_tokenizer(tmp_path / "source")
    params, paths = tiny_params(prepare_parent={"source": str(tmp_path / "source")}), Paths(tmp_path / "artifacts")
    prepare_parent.fn(params, paths)
    tiny_corpus(paths.corpus, SIZES["vocab_size"], SEQ_LEN)
    with pytest.raises(InputError, match=r"states of source at boundary \d are not finite: .* in torch.float32"):
        cache(params, paths)


def test_bfloat16_is_cached_as_bfloat16(finished: tuple[Params, Paths]) -> None:
    _, paths = finished
    exact = BoundaryReader(paths.activations, "train", 3).read([5])
    cache(tiny_params(cache_activations={"dtype": "bfloat16"}), paths)
    rounded = BoundaryReader(paths.activations, "train", 3).read([5])
    assert torch.equal(rounded, exact.bfloat16())
