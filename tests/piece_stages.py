"""Stages whose pieces workers of any kind make: a light one that can be held, and one that makes a whole library.

Pieces of the light stage wait while the file `closed` exists, if as many are finished as it holds.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from storage.files import sha256
from storage.paths import Paths
from tests.clone import ROOT, Clone
from tests.settings import tiny_values
from tests.stages import cache, distill, prepare, score

LIGHT = """
import os, signal, time
from pathlib import Path
from flows.stage import main, run_pieces
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from storage.files import DamagedFileError
from storage.pieces import Pieces

@task(cache_policy=NO_CACHE)
def make(piece, paths):
    with (paths.root.parent / "begun").open("a") as begun:
        begun.write(f"{piece} {os.getpid()} {os.environ.get('NODE', '')}\\n")
    get_run_logger().info("piece %s is under way", piece)
    if piece == os.environ.get("KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)
    if (paths.root.parent / f"damaged{piece}").exists():
        raise DamagedFileError(f"piece {piece} is damaged")
    closed = paths.root.parent / "closed"
    while closed.exists() and len(list(paths.root.glob(".pieces/*.json"))) >= int(closed.read_text() or "0"):
        time.sleep(0.05)
    Pieces(paths.root, "the test").finish(piece, "key", [])

@flow(name="light")
def light(params, paths):
    missing = Pieces(paths.root, "the test").keep_only(dict.fromkeys(map(str, range(8)), "key"))
    run_pieces(make, missing, paths, unit="piece")

if __name__ == "__main__":
    main(light)
"""
LIBRARY = """
from flows.cache_activations import cache_activations
from flows.distill_blocks import distill_blocks
from flows.score_blocks import score_blocks
from flows.stage import main
from prefect import flow

@flow(name="library")
def library(params, paths):
    for stage in (cache_activations, distill_blocks, score_blocks):
        stage.fn(params, paths)

if __name__ == "__main__":
    main(library)
"""


def stage_folder(folder: Path, execution: dict[str, Any], environment: dict[str, str]) -> Clone:
    """Make a folder with params.yaml and both stages; the code is this checkout's."""
    values = tiny_values(run={"workers": 2}, execution=execution)
    (folder / "params.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    (folder / "light.py").write_text(LIGHT, encoding="utf-8")
    (folder / "library.py").write_text(LIBRARY, encoding="utf-8")
    return Clone(folder, {"PYTHONPATH": str(ROOT), **environment})


def closed(folder: Path, after: int = 0) -> Path:
    """Have the light stage's pieces wait after so many that are finished, until the file is deleted."""
    path = folder / "closed"
    path.write_text(str(after), encoding="utf-8")
    return path


def begun(folder: Path) -> list[list[str]]:
    """Return what the light stage's pieces wrote when they began: piece, process, node."""
    path = folder / "begun"
    return [line.split(" ") for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def finished(folder: Path) -> set[str]:
    """Return the names of the light stage's finished pieces."""
    return {path.stem for path in (folder / "artifacts/.pieces").glob("*.json")}


def library_on_threads(folder: Path) -> dict[str, str]:
    """Make cache, library and scores of a tiny parent in this process; return the files' checksums.

    `folder / "inputs"` holds parent and corpus alone, for others to start from.
    """
    params, paths = prepare("llama", folder)
    shutil.copytree(paths.root, folder / "inputs")
    cache(params, paths)
    distill(params, paths)
    score(params, paths)
    return made(folder)


def made(folder: Path) -> dict[str, str]:
    """Return the checksum of every file of cache, library and scores."""
    paths = Paths(folder / "artifacts")
    folders = (paths.activations, paths.library, paths.score_pieces)
    files = [paths.scores, *(path for folder in folders for path in folder.rglob("*") if path.is_file())]
    return {path.relative_to(paths.root).as_posix(): sha256(path) for path in files}
