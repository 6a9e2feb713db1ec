"""A full disk, and folders that may not be written, in the writers of every stage: one sentence, nothing is lost."""

import errno
import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from flows.errors import run_cleanly
from storage.files import DiskFullError, InputError
from storage.params import Params
from storage.paths import Paths
from storage.pipeline import read_pipeline
from tasks import (
    assemble_child,
    benchmark_throughput,
    distill_child,
    evaluate_child,
    export_child,
    export_parent,
    measure_accuracy,
    measure_costs,
    refine_child,
    report,
    search_architecture,
    search_baselines,
    write_text,
)
from tasks.checkpoints import exports
from tasks.checkpoints.exports import CheckpointToExport
from tasks.prepare_corpus import pack_corpus
from tasks.prepare_parent import prepare_parent
from tests.clone import ROOT, tiny_documents, tiny_parent
from tests.faults.built import digests
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import cache, checksums, distill, score

TARGET = "small"


def _export(source: CheckpointToExport, folder: Path) -> None:
    for piece in exports.begin(source, ("nemotron-nas", "gguf-f16"), folder, 4.0):
        exports.export.fn(piece, source, folder, 4.0)
    exports.write_overview(source, ("nemotron-nas", "gguf-f16"), folder)


def _write_text(params: Params, paths: Paths) -> None:
    batches, writer = write_text.plan_batches.fn(params, paths), write_text.load_writer.fn(params, paths)
    for batch in batches:
        write_text.write_batch.fn(batch, writer, params, paths)


def _throughput(params: Params, paths: Paths) -> None:
    """Write throughput.parquet without the speeds that a clock measures, which differ between runs."""
    rows = benchmark_throughput.model_throughput.fn(TARGET, params, paths)
    benchmark_throughput.write_rows.fn(TARGET, rows, paths)


def _evaluate(params: Params, paths: Paths) -> None:
    files, batches = (
        evaluate_child.exported_files(TARGET, params, paths),
        evaluate_child.plan_batches(params, paths),
    )
    quality = [evaluate_child.measure_quality.fn(batch, TARGET, params, paths) for batch in batches]
    parts = evaluate_child.plan_exports(files, params)
    exported = [evaluate_child.measure_exports.fn(part, files, TARGET, params, paths) for part in parts]
    evaluate_child.write_evaluation.fn(TARGET, quality, exported, params, paths)


def _report(params: Params, paths: Paths) -> None:
    """Write the page without figures, which take seconds to draw, and are written as the page is."""
    with patch.object(report, "all_parts", return_value=[]):
        report.write_report.fn(params, paths)


RUNS: dict[str, Callable[[Params, Paths], object]] = {
    "prepare_parent": prepare_parent.fn,
    "measure_costs": measure_costs.write_cost_table.fn,
    "export_parent": lambda params, paths: _export(export_parent.read_parent(params, paths), paths.parent_exports),
    "write_text": _write_text,
    "prepare_corpus": pack_corpus.fn,
    "cache_activations": cache,
    "distill_blocks": distill,
    "score_blocks": score,
    "search_architecture": lambda params, paths: search_architecture.search.fn(TARGET, params, paths),
    "search_baselines": lambda params, paths: search_baselines.search_baselines.fn(TARGET, params, paths),
    "assemble_child": lambda params, paths: assemble_child.assemble.fn(TARGET, params, paths),
    "refine_child": lambda params, paths: refine_child.refine.fn(TARGET, params, paths),
    "distill_child": lambda params, paths: distill_child.distill.fn(TARGET, params, paths),
    "export_child": lambda params, paths: _export(export_child.read_child(TARGET, paths), paths.exports(TARGET)),
    "benchmark_throughput": _throughput,
    "evaluate_child": _evaluate,
    "measure_accuracy": lambda params, paths: measure_accuracy.write_measured.fn(TARGET, [], (), params, paths),
    "report": _report,
}
"""Every stage, run in this process."""
STAGES = {stage.name: stage for stage in read_pipeline(ROOT / "dvc.yaml")}


def _outs(name: str, paths: Paths) -> list[Path]:
    """List what a stage makes, as dvc.yaml has it."""
    outs = (Path(out.replace("${key}", TARGET)) for out in STAGES[name].outs)
    return [paths.root / out.relative_to("artifacts") for out in outs]


def _params(root: Path) -> Params:
    sources = [{"kind": "files", "path": str(root / "documents/text.jsonl")}, {"kind": "written", "weight": 0.03}]
    corpus = {
        "sources": sources,
        "seq_len": SEQ_LEN,
        "train_tokens": 48 * SEQ_LEN,
        "calibration_tokens": 16 * SEQ_LEN,
        "validation_tokens": 8 * SEQ_LEN,
    }
    written = {"tokens": 4 * SEQ_LEN, "chat_tokens": 2 * SEQ_LEN, "rows": 2, "row_tokens": SEQ_LEN}
    return tiny_params(
        prepare_parent={"source": str(root / "parent")},
        write_text=written,
        prepare_corpus=corpus,
        measure_costs={"hardware": ["h100-sxm"], "scenarios": ["8/8"], "batches": [2]},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Paths]:
    """Return a run of all these stages, which no test changes."""
    root = tmp_path_factory.mktemp("finished")
    tiny_parent(root / "parent")
    tiny_documents(root / "documents")
    params, paths = _params(root), Paths(root / "artifacts")
    for name in STAGES:
        RUNS[name](params, paths)
    return params, paths


def _remove(name: str, paths: Paths) -> None:
    """Delete what a stage makes."""
    for out in _outs(name, paths):
        shutil.rmtree(out) if out.is_dir() else out.unlink()


def _full_at(file_that_fails: int) -> Callable[[int], None]:
    """Return a stand-in for os.fsync, which finds no room for the file of this number, from 0."""
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
    params, whole = finished
    paths = Paths(tmp_path / "artifacts")
    shutil.copytree(whole.root, paths.root)
    _remove(name, paths)
    before = checksums(paths.root)
    num_files = len(checksums(whole.root)) - len(before)
    for file_that_fails in {0, min(2, num_files - 1)}:
        monkeypatch.setattr(os, "fsync", _full_at(file_that_fails))
        with pytest.raises(DiskFullError, match=r"the disk is full: .* could not be written; free some space"):
            RUNS[name](params, paths)
        monkeypatch.undo()
        after = checksums(paths.root)
        assert before.items() <= after.items()
    RUNS[name](params, paths)
    assert digests(paths.root) == digests(whole.root)


def test_artifacts_that_may_not_be_written_are_one_sentence_in_every_stage(
    finished: tuple[Params, Paths], tmp_path: Path
) -> None:
    """In a process without root's right to write everywhere; what was there is there afterwards, byte for byte."""
    _, whole = finished
    for name in STAGES:
        paths = Paths(tmp_path / name)
        shutil.copytree(whole.root, paths.root)
        if name not in ("prepare_parent", "assemble_child"):
            _remove(name, paths)
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
    for name in STAGES:
        try:
            run_cleanly(functools.partial(RUNS[name], _params(Path(root)), Paths(Path(folder) / name)))
        except SystemExit as ended:
            sys.stdout.write(f"{name}={ended.code}\n")
