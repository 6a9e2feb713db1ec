"""A finished run of the stages up to score_blocks on a tiny parent, made once; tests change a copy of it."""

import shutil
from pathlib import Path

import pytest

from storage.params import Params
from storage.paths import Paths
from tests.stages import STAGES, prepare


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
