"""A full disk, and folders that may not be written, in the writers of every stage: one sentence, nothing is lost."""

import errno
import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.errors import run_cleanly
from storage.files import DiskFullError, InputError
from storage.params import Params
from storage.paths import Paths
from tasks import distill_child, export_child
from tasks.checkpoints import exports
from tasks.prepare_corpus import pack_corpus
from tasks.prepare_parent import prepare_parent
from tests.clone import ROOT, tiny_documents, tiny_parent
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import assemble, cache, checksums, distill, score

VARIANTS = [("kv_1", "ffn_48"), ("no_op", "ffn_24"), ("kv_2", "no_op"), ("kv_2", "ffn_96")]


def _export(params: Params, paths: Paths) -> None:
    source, folder = export_child.read_child("small", paths), paths.exports("small")
    for piece in exports.begin(source, ("nemotron-nas", "gguf-f16"), folder, 4.0):
        exports.export.fn(piece, source, folder, 4.0)
    exports.write_overview(source, ("nemotron-nas", "gguf-f16"), folder)


@dataclass(frozen=True)
class Stage:
    """A stage, run in this process, and the artifacts that it writes."""

    run: Callable[[Params, Paths], object]
    outs: Callable[[Paths], tuple[Path, ...]]


STAGES = {
    "prepare_parent": Stage(prepare_parent.fn, lambda paths: (paths.parent,)),
    "prepare_corpus": Stage(pack_corpus.fn, lambda paths: (paths.corpus,)),
    "cache_activations": Stage(cache, lambda paths: (paths.activations,)),
    "distill_blocks": Stage(distill, lambda paths: (paths.library,)),
    "score_blocks": Stage(score, lambda paths: (paths.scores, paths.score_pieces)),
    "assemble_child": Stage(
        lambda params, paths: assemble(params, paths, VARIANTS), lambda paths: (paths.assembled("small"),)
    ),
    "distill_child": Stage(
        lambda params, paths: distill_child.distill.fn("small", params, paths),
        lambda paths: (paths.distilled("small"), paths.gkd("small")),
    ),
    "export_child": Stage(_export, lambda paths: (paths.exports("small"),)),
}


def _params(root: Path) -> Params:
    source = {"kind": "files", "path": str(root / "documents/text.jsonl")}
    corpus = {
        "sources": [source],
        "seq_len": SEQ_LEN,
        "train_tokens": 48 * SEQ_LEN,
        "calibration_tokens": 16 * SEQ_LEN,
        "validation_tokens": 8 * SEQ_LEN,
    }
    return tiny_params(prepare_parent={"source": str(root / "parent")}, prepare_corpus=corpus)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    """A run of all these stages, which no test changes."""
    root = tmp_path_factory.mktemp("finished")
    tiny_parent(root / "parent")
    tiny_documents(root / "documents")
    params, paths = _params(root), Paths(root / "artifacts")
    for stage in STAGES.values():
        stage.run(params, paths)
    return params, paths


def _full_at(file_that_fails: int) -> Callable[[int], None]:
    """A stand-in for os.fsync, which finds no room for the file of this number, from 0."""
    numbers = itertools.count()

    def fsync(_: int) -> None:
        if next(numbers) == file_that_fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


@pytest.mark.parametrize("name", STAGES)
def test_a_full_disk_is_one_error_and_the_next_run_ends_in_the_same_bytes(
    name: str, finished: tuple[Params, Paths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and a later file of the stage find no room; finished artifacts of other stages stay as they are."""
    (params, whole), stage = finished, STAGES[name]
    paths = Paths(tmp_path / "artifacts")
    shutil.copytree(whole.root, paths.root)
    for out in stage.outs(paths):
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    before = checksums(paths.root)
    for file_that_fails in (0, 2):
        monkeypatch.setattr(os, "fsync", _full_at(file_that_fails))
        with pytest.raises(DiskFullError, match=r"the disk is full: .* could not be written; free some space"):
            stage.run(params, paths)
        monkeypatch.undo()
        after = checksums(paths.root)
        assert before.items() <= after.items()
    stage.run(params, paths)
    assert checksums(paths.root) == checksums(whole.root)


def test_artifacts_that_may_not_be_written_are_one_sentence_in_every_stage(
    finished: tuple[Params, Paths], tmp_path: Path
) -> None:
    """In a process without root's right to write everywhere; what was there is there afterwards, byte for byte."""
    _, whole = finished
    for name, stage in STAGES.items():
        paths = Paths(tmp_path / name)
        shutil.copytree(whole.root, paths.root)
        for out in stage.outs(paths) if name not in ("prepare_parent", "assemble_child") else ():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    before = checksums(tmp_path)
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    as_a_user = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
    script = f"from tests.tasks.test_disk import run_all; run_all({str(whole.root.parent)!r}, {str(tmp_path)!r})"
    try:
        ended = subprocess.run([*as_a_user, sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert ended.stdout.split() == [f"{name}={InputError.exit_code}" for name in STAGES], ended
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(STAGES) and "Traceback" not in ended.stderr, ended.stderr
    assert all("cannot be read or written" in error and str(tmp_path) in error for error in errors), errors
    assert checksums(tmp_path) == before


def run_all(root: str, folder: str) -> None:
    """Run every stage on its own artifacts in `folder`, as `main` of a flow does; print its exit code."""
    for name, stage in STAGES.items():
        try:
            run_cleanly(functools.partial(stage.run, _params(Path(root)), Paths(Path(folder) / name)))
        except SystemExit as ended:
            sys.stdout.write(f"{name}={ended.code}\n")
