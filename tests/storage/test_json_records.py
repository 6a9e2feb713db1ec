"""JSON artifacts as records: what is read and written again has the same bytes, and what is damaged is named."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storage.architecture import Baselines, read_architecture, read_baselines, write_architecture, write_baselines
from storage.evaluation import read_evaluation, write_evaluation
from storage.files import DamagedFileError, InputError, read_sealed, write_sealed
from storage.gkd import read_gkd, write_gkd
from storage.json_records import as_record
from storage.parent_info import INFO, read_parent_info, write_parent_info
from storage.paths import Paths
from storage.refinement import read_refinement, write_refinement
from tests.report_run import write_run

TARGET = "small"


@dataclass(frozen=True)
class Numbers:
    """A record whose keys a file chooses."""

    numbers: dict[str, int]


@dataclass(frozen=True)
class Artifact:
    """A JSON file, how it is read and written, a field of it that a damaged file lacks, and the command to rebuild."""

    path: Callable[[Paths], Path]
    read: Callable[[Paths], Any]
    rewrite: Callable[[Paths], None]
    field: tuple[str | int, ...]
    rebuild: str


ARTIFACTS = {
    "puzzle_parent.json": Artifact(
        lambda paths: paths.parent / INFO,
        lambda paths: read_parent_info(paths.parent),
        lambda paths: write_parent_info(paths.parent, read_parent_info(paths.parent)),
        ("config", "hidden_size"),
        "dvc repro prepare_parent",
    ),
    "architecture.json": Artifact(
        lambda paths: paths.architecture(TARGET),
        lambda paths: read_architecture(TARGET, paths),
        lambda paths: write_architecture(paths.architecture(TARGET), read_architecture(TARGET, paths)),
        ("predicted", "score"),
        "dvc repro search_architecture@small",
    ),
    "baselines.json": Artifact(
        lambda paths: paths.baselines(TARGET),
        lambda paths: read_baselines(TARGET, paths),
        lambda paths: write_baselines(paths.baselines(TARGET), Baselines(TARGET, read_baselines(TARGET, paths))),
        ("baselines", "uniform", "weights"),
        "dvc repro search_baselines@small",
    ),
    "evaluation.json": Artifact(
        lambda paths: paths.evaluation(TARGET),
        lambda paths: read_evaluation(TARGET, paths),
        lambda paths: write_evaluation(paths.evaluation(TARGET), read_evaluation(TARGET, paths)),
        ("constraints", 1, "limit"),
        "dvc repro evaluate_child@small",
    ),
    "gkd.json": Artifact(
        lambda paths: paths.gkd(TARGET),
        lambda paths: read_gkd(TARGET, paths),
        lambda paths: write_gkd(paths.gkd(TARGET), read_gkd(TARGET, paths)),
        ("held_out", 2, "kl"),
        "dvc repro distill_child@small",
    ),
    "refine.json": Artifact(
        lambda paths: paths.refinement(TARGET),
        lambda paths: read_refinement(TARGET, paths),
        lambda paths: write_refinement(paths.refinement(TARGET), read_refinement(TARGET, paths)),
        ("blocks", 1, "subblocks", 0, "error_after"),
        "dvc repro refine_child@small",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Return a run with all artifacts; every test puts back what it changes."""
    paths = Paths(tmp_path_factory.mktemp("run") / "artifacts")
    write_run(paths)
    return paths


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_record_that_is_written_again_has_the_same_bytes(name: str, finished: Paths) -> None:
    artifact = ARTIFACTS[name]
    before = artifact.path(finished).read_bytes()
    artifact.rewrite(finished)
    assert artifact.path(finished).read_bytes() == before


@pytest.mark.parametrize("change", ["lacks", "has another type"])
@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_foreign_file_is_an_error_that_names_file_field_and_remedy(name: str, change: str, finished: Paths) -> None:
    artifact = ARTIFACTS[name]
    path = artifact.path(finished)
    before = path.read_bytes()
    value: dict[Any, Any] = read_sealed(path, "the test")
    *parents, last = artifact.field
    holder = value
    for key in parents:
        holder = holder[key]
    if change == "lacks":
        del holder[last]
    else:
        holder[last] = {"of": "another kind"}
    write_sealed(path, value)
    try:
        with pytest.raises(DamagedFileError) as raised:
            artifact.read(finished)
    finally:
        path.write_bytes(before)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{path} does not hold what its stage writes: field {'.'.join(map(str, artifact.field))}")
    assert message.endswith(f"; run `{artifact.rebuild}`")


def test_a_key_with_line_breaks_is_one_line_of_the_message() -> None:
    with pytest.raises(DamagedFileError, match=r"field numbers\.'a\\nb': .*, found 'c'; run `again`") as caught:
        as_record({"numbers": {"a\nb": "c"}}, Numbers, "the file", "again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_missing_file_is_an_error_with_its_remedy(name: str, tmp_path: Path) -> None:
    artifact = ARTIFACTS[name]
    with pytest.raises(InputError, match=f"{name} is missing; run `{artifact.rebuild}`"):
        artifact.read(Paths(tmp_path))
