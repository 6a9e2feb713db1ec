"""Rolling mode gives the same library and scores from a window of boundaries; disk space, resuming, damage."""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage.activations import shard_path, write_shard
from storage.files import DamagedFileError, InputError
from storage.library import Library
from storage.params import Params
from storage.paths import Paths
from tasks.cache_activations import plan_shards
from tasks.distill_blocks import plan_blocks, train_block
from tasks.score_blocks import plan_groups, score_jobs
from tests.settings import tiny_params
from tests.stages import cache, checksums, distill, prepare, score
from tests.tiny import FAMILIES, flip_byte

SPANS = [2]


def rolling(**overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return overrides of tiny_params: spans of 2; float32 compute and a bfloat16 cache, so that reading rounds."""
    defaults: dict[str, dict[str, Any]] = {
        "cache_activations": {"mode": "rolling", "dtype": "bfloat16"},
        "distill_blocks": {"spans": SPANS},
    }
    return {name: {**defaults.get(name, {}), **overrides.get(name, {})} for name in {*defaults, *overrides}}


MATERIALISED = rolling(cache_activations={"mode": "materialised"})


def run(params: Params, paths: Paths) -> dict[str, str]:
    """Run cache, BLD and scores; return the checksums of all files that they wrote, records of pieces included."""
    cache(params, paths)
    distill(params, paths)
    score(params, paths)
    all_checksums = {"scores": checksums(paths.root)[paths.scores.name]}
    for folder, files in (("l", checksums(paths.library)), ("s", checksums(paths.score_pieces))):
        all_checksums |= {f"{folder}/{name}": sha for name, sha in files.items()}
    return all_checksums


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Paths, dict[str, str]]:
    """Make a materialised run."""
    params, paths = prepare("llama", tmp_path_factory.mktemp("whole"), **MATERIALISED)
    return paths, run(params, paths)


@pytest.fixture
def case(tmp_path: Path) -> tuple[Params, Paths]:
    """Prepare a parent and a corpus, cached in rolling mode."""
    params, paths = prepare("llama", tmp_path, **rolling())
    cache(params, paths)
    return params, paths


def on_disk(paths: Paths) -> set[str]:
    return {path.name for path in paths.rolling.glob("*")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rolling_gives_the_bytes_of_materialised(family: str, dtype: str, tmp_path: Path) -> None:
    made = []
    for mode in ("materialised", "rolling"):
        overrides = rolling(cache_activations={"mode": mode, "dtype": dtype})
        params, paths = prepare(family, tmp_path / mode, **overrides)
        made.append(run(params, paths))
        assert not paths.rolling.exists()
    assert made[0] == made[1]
    assert any(name.startswith("l/span_") for name in made[0])


@pytest.mark.parametrize("spans", [[], [2]], ids=str)
def test_no_more_than_the_longest_span_and_one_boundary_lie_on_disk(
    spans: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window holds three boundaries; the fourth, the parent's last one, is in the cache."""
    params, paths = prepare("llama", tmp_path, **rolling(distill_blocks={"spans": spans}))
    cache(params, paths)
    counts = []

    def counted(path: Path, *rest: Any) -> None:
        write_shard(path, *rest)
        counts.append(len(on_disk(paths)))

    monkeypatch.setattr("tasks.tensors.activations.write_shard", counted)
    distill(params, paths)
    score(params, paths)
    Library(paths.library).path("block_002.ffn_48").unlink()
    distill(params, paths)  # walks to the last block at once
    assert max(counts) == max([1, *spans]) + 1
    kept = {path.name for path in (paths.activations / "train").iterdir()}
    assert kept == {"boundary_000", "boundary_003"}


def test_each_stage_walks_through_the_parent_once(case: tuple[Params, Paths], monkeypatch: pytest.MonkeyPatch) -> None:
    """A boundary's shards are computed once in BLD and once for the scores, which read calibration only."""
    params, paths = case
    written: list[tuple[str, str]] = []

    def noted(path: Path, *rest: Any) -> None:
        write_shard(path, *rest)
        written.append((path.parent.parent.name, f"{path.parent.name}/{path.stem}"))

    monkeypatch.setattr("tasks.tensors.activations.write_shard", noted)
    distill(params, paths)
    score(params, paths)
    boundaries = [f"boundary_{index:03d}" for index in range(3)]
    train = [("train", f"{boundary}/shard_{shard:03d}") for boundary in boundaries for shard in range(3)]
    held_out = [("calibration", f"{boundary}/shard_{shard:03d}") for boundary in boundaries for shard in range(2)]
    scored = [("calibration", f"{boundary}/shard_000") for boundary in boundaries]
    assert sorted(written) == sorted(train + held_out + scored)


def test_another_mode_makes_no_piece_anew(whole: tuple[Paths, dict[str, str]], tmp_path: Path) -> None:
    source, made = whole
    shutil.copytree(source.root, tmp_path / "artifacts")
    paths, params = Paths(tmp_path / "artifacts"), tiny_params(**rolling())
    assert len(plan_shards.fn(params, paths)) == 5  # they keep less, and GKD's teacher, now live, needs none of its own
    cache(params, paths)
    assert distill(params, paths) == []
    assert score(params, paths) == []
    assert run(tiny_params(**MATERIALISED), paths) == made


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_killed_walk_goes_on_to_the_same_bytes(
    first: int, case: tuple[Params, Paths], whole: tuple[Paths, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed as it writes the window of block `first`, and leaves a shard without its record."""
    params, paths = case
    plans = plan_blocks.fn(params, paths)
    for plan in plans:
        if plan.first_block < first:
            train_block.fn(plan, params, paths)
    fail_after(1, monkeypatch)
    if first > 0:
        shutil.rmtree(paths.rolling / f"{first:03d}")
    with pytest.raises(KeyboardInterrupt):
        train_block.fn(next(plan for plan in plans if plan.first_block == first), params, paths)
    monkeypatch.undo()
    distill(params, paths)
    score(params, paths)
    assert run(params, paths) == whole[1]


def fail_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process when it has written that many shards, before the record of the last one."""
    left = iter(range(shards))

    def failing(*arguments: Any) -> None:
        write_shard(*arguments)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr("tasks.tensors.activations.write_shard", failing)


def test_one_missing_entry_is_trained_from_the_tokens_on(
    case: tuple[Params, Paths], whole: tuple[Paths, dict[str, str]]
) -> None:
    params, paths = case
    assert run(params, paths) == whole[1]
    Library(paths.library).path("block_001.ffn_48").unlink()
    assert distill(params, paths) == ["block_001.ffn_48"]
    assert run(params, paths) == whole[1]


def assert_damage_is_named(stage: str, works: Sequence[Callable[[], None]], boundary: int, paths: Paths) -> None:
    """Read `boundary` for both pieces; it loses a byte between them."""
    works[0]()
    flip_byte(shard_path(paths.rolling / f"{boundary:03d}", "calibration", boundary, 0), -300)
    with pytest.raises(
        DamagedFileError, match=rf"rolling/{boundary:03d}.*damaged.*rm -r .*rolling && dvc repro {stage}`"
    ):
        works[1]()
    shutil.rmtree(paths.rolling)
    works[1]()


def test_a_flipped_byte_in_the_window_names_the_command(case: tuple[Params, Paths]) -> None:
    params, paths = case
    plans = [plan for plan in plan_blocks.fn(params, paths) if plan.first_block + plan.span == 2]
    work = [partial(train_block.fn, plan, params, paths) for plan in plans]
    assert_damage_is_named("distill_blocks", work, 2, paths)
    distill(params, paths)
    groups = plan_groups.fn(params, paths)
    assert_damage_is_named("score_blocks", [partial(score_jobs.fn, group, params, paths) for group in groups], 1, paths)


def test_a_boundary_that_the_parent_has_not_cannot_be_kept(tmp_path: Path) -> None:
    params, paths = prepare("llama", tmp_path, **rolling(cache_activations={"keep": [4]}))
    with pytest.raises(InputError, match=r"keep names boundary 4, .* has 0 to 3"):
        plan_shards.fn(params, paths)
