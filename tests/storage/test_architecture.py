"""architecture.json and baselines.json: the bytes that a search writes are read and written again as they are."""

from pathlib import Path
from typing import Any

import pytest

from storage.architecture import Baselines as BaselinesRecord
from storage.architecture import read_architecture, read_baselines, write_architecture, write_baselines
from storage.files import DamagedFileError, InputError, read_sealed, write_sealed
from storage.paths import Paths
from storage.tables import write_costs
from tasks.search_baselines import search_baselines
from tests.search_tables import SPEED, TARGET, costs, run_search, tiny_search_params, write_tables

MIX: dict[str, Any] = {"mix": {"128/128": 3, "256/16": 1}}
LIMITS: dict[str, Any] = {
    "size": {"metric": "block_params", "at_most_ratio": 0.9},
    "count": {"metric": "attention_blocks", "at_least": 1},
    "memory": {"metric": "memory_gib", "at_most": 5, "batch": 2, "context": 64},
    "speed": {"metric": "throughput", "at_least_ratio": 1.01, **SPEED, "batch": "best"},
    "mixed": {"metric": "latency_ms", "at_most_ratio": 1, **SPEED, "scenario": None, **MIX},
}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """Make artifacts with a searched child that has a limit of each kind, and its baselines."""
    paths = Paths(tmp_path / "artifacts")
    write_tables(paths)
    write_costs(paths.costs, [*costs(), *costs("256/16")])
    run_search(LIMITS, paths)
    search_baselines.fn(TARGET, tiny_search_params(LIMITS), paths)
    return paths


def test_an_architecture_keeps_its_bytes(paths: Paths) -> None:
    chosen = read_architecture(TARGET, paths)
    before = paths.architecture(TARGET).read_bytes()
    write_architecture(paths.architecture(TARGET), chosen)
    assert paths.architecture(TARGET).read_bytes() == before
    assert [limit.name for limit in chosen.constraints] == [*LIMITS, "fits h100-sxm at 128/128"]
    speed = chosen.predicted.speed
    assert speed is not None
    assert speed.setting == chosen.operating_points[0] == chosen.constraints[3].setting
    assert chosen.predicted.throughput_ratio == speed.ratio


def test_baselines_keep_their_bytes(paths: Paths) -> None:
    baselines = read_baselines(TARGET, paths)
    before = paths.baselines(TARGET).read_bytes()
    write_baselines(paths.baselines(TARGET), BaselinesRecord(TARGET, baselines))
    assert paths.baselines(TARGET).read_bytes() == before
    assert any(baseline.blocks for baseline in baselines.values())


def test_a_limit_is_kept_on_its_side(paths: Paths) -> None:
    limits = {limit.name: limit for limit in read_architecture(TARGET, paths).constraints}
    assert all(limit.is_kept_by(limit.predicted) for limit in limits.values())
    assert not limits["size"].is_kept_by(0.91) and not limits["speed"].is_kept_by(1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fields: fields.pop("predicted"), "predicted"),
        (lambda fields: fields["blocks"].pop(0), "must cover the parent.s blocks once"),
        (lambda fields: fields["blocks"][0].pop("ffn"), "field blocks"),
        (lambda fields: fields["constraints"][0].update(limit="much"), "constraints.0.limit"),
    ],
    ids=["lacks a field", "lacks blocks", "damaged block", "wrong type"],
)
def test_a_damaged_file_is_named_with_the_command_that_makes_it(paths: Paths, change: Any, words: str) -> None:
    path = paths.architecture(TARGET)
    fields = read_sealed(path, "the test")
    change(fields)
    write_sealed(path, fields)
    with pytest.raises(DamagedFileError, match=f"architecture.json.*({words}).*dvc repro search_architecture@{TARGET}"):
        read_architecture(TARGET, paths)


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"architecture.json is missing; run `dvc repro search_architecture@{TARGET}`"):
        read_architecture(TARGET, Paths(tmp_path))
