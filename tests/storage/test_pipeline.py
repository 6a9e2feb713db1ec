"""The code deps of dvc.yaml: which files are behind a stage, and how they are written."""

from pathlib import Path

import pytest

from storage.pipeline import code_deps, overlap, read_pipeline, with_code_deps
from storage.sources import SOURCES, Sources

YAML = """# Stages.
stages:
  distill_blocks:
    cmd: python -m flows.distill_blocks
    deps:
      - artifacts/parent  # data
      - tasks/puzzle/search/mip.py
    outs:
      - artifacts/library: {persist: true}
  search_baselines:
    foreach: ${targets}
    do:
      deps:
        - artifacts/costs.parquet
      outs:
        - artifacts/children/${key}/baselines.json
"""


def test_imports_are_followed_through_the_project() -> None:
    files = code_deps("distill_blocks", Sources())
    assert {
        "tasks/distill_blocks.py",
        "tasks/puzzle/distill/bld.py",
        "tasks/puzzle/model/blocks.py",  # behind bld.py
        "storage/model_config.py",
    } <= set(files)
    assert files == sorted(files, key=Path)
    assert not [file for file in files if not file.startswith(("tasks/", "storage/"))]
    assert "tasks/puzzle/search/mip.py" not in files, "an edit of the search must not re-train blocks"
    assert "storage/params.py" not in files, "every stage reads it, and its changes show in no artifact"


def test_code_deps_are_written_behind_the_data_and_the_rest_stays() -> None:
    sources = Sources()
    written = with_code_deps(YAML, sources)
    assert with_code_deps(written, sources) == written
    lines = [line for line in written.splitlines() if not line.endswith(".py")]
    assert lines == [line for line in YAML.splitlines() if not line.endswith(".py")]
    for stage, indent in (("distill_blocks", " " * 6), ("search_baselines", " " * 8)):
        deps = "\n".join(f"{indent}- {path}" for path in code_deps(stage, sources))
        data = {"distill_blocks": "artifacts/parent  # data", "search_baselines": "artifacts/costs.parquet"}[stage]
        assert f"{indent}- {data}\n{deps}\n{indent[2:]}outs:\n" in written


def test_dvc_yaml_has_the_code_deps_that_follow_from_the_imports() -> None:
    text = (SOURCES / "dvc.yaml").read_text(encoding="utf-8")
    assert with_code_deps(text, Sources()) == text, "run `python -m storage.pipeline --write`"


@pytest.mark.parametrize(
    ("path", "other", "expected"),
    [("a/b", "a/b", True), ("a", "a/b", True), ("a/b", "a", True), ("a/b", "a/bc", False), ("a", "b", False)],
)
def test_paths_overlap_where_either_is_within_the_other(path: str, other: str, expected: bool) -> None:
    assert overlap(path, other) is expected


def test_stages_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(YAML, encoding="utf-8")
    distill, search = read_pipeline(tmp_path / "dvc.yaml")
    assert (distill.name, distill.deps, distill.outs, distill.per_target) == (
        "distill_blocks",
        ("artifacts/parent",),
        ("artifacts/library",),
        False,
    )
    assert search.per_target
    assert not search.reads(distill)
