"""Two people, one bucket, and DVC: what one pushed is a no-op for the other, who goes on from the bucket's shards."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.clone import Clone, make_clone, tiny_documents, tiny_parent, tiny_run_params
from tests.s3_server import S3Server
from tests.stages import checksums

STAGE = "distill_blocks"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return params of a tiny run."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_parent(folder / "parent")
    tiny_documents(folder / "documents")
    params = tiny_run_params(folder / "parent", folder / "documents")
    params["distill_blocks"] |= {"tokens": 64 * 16, "linear": False}
    return params


@pytest.fixture(scope="module")
def first(inputs: dict[str, Any], s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """Return a clone whose library is in the bucket, and whose artifacts were pushed to the same server."""
    storage = {"storage": {"root": f"s3://{s3.bucket}/shared"}}
    clone = make_clone(tmp_path_factory.mktemp("first") / "clone", inputs | storage)
    clone = replace(clone, environment=s3.environment)
    clone.must("dvc", "remote", "add", "--default", "shared", f"s3://{s3.bucket}/dvc")
    clone.must("dvc", "repro", STAGE)
    clone.must("dvc", "push", STAGE, "cache_activations", "prepare_corpus", "write_text", "prepare_parent")
    return clone


@pytest.fixture
def second(first: Clone, tmp_path: Path) -> Clone:
    """Return what git would carry of the first clone to another machine."""
    git = ("git", "-c", "user.name=tests", "-c", "user.email=tests@localhost")
    for command in (("add", "-A"), ("commit", "-q", "--allow-empty", "-m", "run")):
        subprocess.run([*git, *command], cwd=first.folder, check=True)
    subprocess.run(["git", "clone", "-q", str(first.folder), str(tmp_path / "clone")], check=True)
    return Clone(tmp_path / "clone", first.environment)


def test_git_and_dvc_carry_checksums_alone(first: Clone, s3: S3Server) -> None:
    """The shards and the weights are in the bucket, each named by its sha256."""
    for name in ("activations", "library"):
        suffixes = {path.suffix for path in (first.artifacts / name).rglob("*") if path.is_file()}
        assert suffixes <= {".json", ".parquet"}
    objects = {path.rpartition("/")[2] for path in s3.client().find(f"{s3.bucket}/shared")}
    for path in (path for name in ("activations", "library") for path in (first.artifacts / name).rglob("*.json")):
        assert {*json.loads(path.read_text())["files"].values()} <= objects, path
    assert not first.stale() & {STAGE, "cache_activations"}


def test_a_colleague_pulls_and_has_nothing_to_do(first: Clone, second: Clone) -> None:
    second.must("dvc", "pull", STAGE, "cache_activations", "prepare_corpus", "write_text", "prepare_parent")
    assert second.must("dvc", "repro", STAGE).ran() == []
    assert not (second.artifacts / "cached").exists(), "no shard was fetched"
    assert checksums(second.artifacts / "library") == checksums(first.artifacts / "library")


def test_a_colleague_trains_another_variant_on_shards_of_the_bucket(first: Clone, second: Clone) -> None:
    """The entries that are there stay, and no shard is computed again."""
    second.must("dvc", "pull", STAGE, "cache_activations", "prepare_corpus", "write_text", "prepare_parent")
    second.set_params(lambda params: params["distill_blocks"].update(ffn_ratios=[0.5, 0.25, 0.75]))
    assert second.must("dvc", "repro", "--single-item", STAGE).ran() == [STAGE]
    fetched = checksums(second.artifacts / "cached/activations")
    assert fetched
    assert fetched.items() <= checksums(first.artifacts / "cached/activations").items()
    records = {path.name: path.read_text() for path in (second.artifacts / "library").rglob("*.json")}
    before = {path.name: path.read_text() for path in (first.artifacts / "library").rglob("*.json")}
    assert before.items() <= records.items()
    assert {name.split(".")[1] for name in records.keys() - before.keys()} == {"ffn_72"}
