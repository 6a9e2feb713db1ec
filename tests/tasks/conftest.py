"""Runs on a tiny parent that are made once, up to score_blocks and up to a child; tests change a copy of them."""

import shutil
from pathlib import Path

import pytest

from storage.params import Params
from storage.paths import Paths
from tests.stages import STAGES, make_child, prepare


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Path]:
    root = tmp_path_factory.mktemp("finished")
    params, paths = prepare("llama", root)
    for stage in STAGES:
        stage(params, paths)
    return params, paths.root


@pytest.fixture
def finished(_finished: tuple[Params, Path], tmp_path: Path) -> tuple[Params, Paths]:
    """Copy the params and artifacts of the finished run to a folder of the test."""
    params, root = _finished
    shutil.copytree(root, tmp_path / "artifacts")
    return params, Paths(tmp_path / "artifacts")


@pytest.fixture(scope="session")
def child(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    """Return a corrected child, which is ready for GKD; made once, and not to be changed."""
    params, paths = prepare("llama", tmp_path_factory.mktemp("child"))
    make_child(params, paths)
    return params, paths


@pytest.fixture
def case(child: tuple[Params, Paths], tmp_path: Path) -> tuple[Params, Paths]:
    """Copy that child to a folder of the test."""
    shutil.copytree(child[1].root, tmp_path / "artifacts")
    return child[0], Paths(tmp_path / "artifacts")
