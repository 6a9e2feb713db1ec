"""A finished clone to do harm to: made once, copied, compared with its copies without what clocks wrote."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from storage.pipeline import PipelineStage, overlap, read_pipeline
from tests.clone import ROOT, SEQ_LEN, TIMINGS, Clone, Ended, make_clone, tiny_documents, tiny_parent, tiny_run_params
from tests.faults import forks
from tests.faults.outcomes import Settings

PIPELINE = read_pipeline(ROOT / "dvc.yaml")
_BUILD_SECONDS = 1200
_DVC = ("dvc.cli.parser", "dvc.repo", "dvc.repo.reproduce", "dvc.stage.cache", "dvc.output", "dvc_data.index")
"""Modules that `dvc repro` needs, imported before it runs in a fork."""
_FEWER: dict[str, dict[str, Any]] = {
    "write_text": {"tokens": 16 * SEQ_LEN, "chat_tokens": 8 * SEQ_LEN, "rows": 4, "row_tokens": SEQ_LEN},
    "prepare_corpus": {
        "train_tokens": 64 * SEQ_LEN,
        "calibration_tokens": 24 * SEQ_LEN,
        "validation_tokens": 8 * SEQ_LEN,
    },
    "cache_activations": {"sequences_per_shard": 16},
    "distill_blocks": {"fit_tokens": 16 * SEQ_LEN, "tokens": 32 * SEQ_LEN, "importance_tokens": 8 * SEQ_LEN},
    "score_blocks": {"tokens": 8 * SEQ_LEN, "initial_tokens": 4 * SEQ_LEN},
    "refine_child": {"tokens": 32 * SEQ_LEN},
    "distill_child": {"tokens": 16 * SEQ_LEN},
    "evaluate_child": {"tokens": 8 * SEQ_LEN, "baseline_tokens": 4 * SEQ_LEN, "export_tokens": 2 * SEQ_LEN},
}
"""Less work than the tests of whole runs have, with several pieces in each stage still."""
TARGETS = ("small", "fast")
_CLOCKS = {"seconds", "seal", "speed", "measured", "measured_spread", "drift"}
"""Keys of JSON artifacts whose values are times of this machine, or digests of them."""
_TIMED_COLUMNS = {"measured_ms", "measured_tokens_per_s", "measured_spread"}
_WITHOUT_CLOCK = {"seconds.json", "search.json", "evaluation.json", "throughput.parquet"}
_DRAWN_FROM_CLOCKS = "report/"
"""Of figures and page it is the names of files that are compared: they show speeds."""


@dataclass(frozen=True)
class Built:
    """The undisturbed clone, the stages that ran in it, in order, and what its artifacts hold: path -> digest."""

    clone: Clone
    stages: tuple[str, ...]
    digests: Mapping[str, str]

    def readers(self, name: str) -> list[str]:
        """Return the stages whose deps are, hold, or lie within an artifact."""
        return [stage for stage in self.stages if _has(name, stage, lambda row: row.deps)]

    def makers(self, name: str) -> list[str]:
        """Return the stages that make an artifact: one, or none."""
        return [stage for stage in self.stages if _has(name, stage, lambda row: row.outs)]

    def outs(self, stage: str) -> list[str]:
        """Return the outs of a stage in dvc.yaml."""
        kind, _, target = stage.partition("@")
        return [path.replace("${key}", target) for row in PIPELINE if row.name == kind for path in row.outs]


def _has(name: str, stage: str, paths: Callable[[PipelineStage], tuple[str, ...]]) -> bool:
    kind, _, target = stage.partition("@")
    rows = (row for row in PIPELINE if row.name == kind)
    return any(overlap(f"artifacts/{name}", path.replace("${key}", target)) for row in rows for path in paths(row))


@dataclass(frozen=True)
class Forks:
    """Commands of a clone in forks of one process that has imported its code, and DVC's."""

    address: str

    def run(self, clone: Clone, *command: str, seconds: float = _BUILD_SECONDS) -> Ended | None:
        """Run `python -m <command>` in a copy of the clone; None if it was killed after so many seconds."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                code = forks.ask(
                    self.address, str(clone.folder), ["-m", *command], (out.fileno(), err.fileno()), seconds
                )
            except TimeoutError:
                return None
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode("utf-8", "replace"))
        return Ended(code, *texts)

    def must(self, clone: Clone, *command: str) -> None:
        """Run a command that has to succeed."""
        ended = self.run(clone, *command)
        assert ended and ended.code == 0, ended


@contextmanager
def built_clone(settings: Settings) -> Iterator[tuple[Built, Forks]]:
    """Yield a clone in which stages ran, its server, which copies use as well, and what runs commands in copies.

    It is made in `<scratch>/base` where that holds none; a short campaign has the stages that all targets share.
    """
    root = settings.scratch / "base"
    if not (root / "whole").exists():
        _begin(root)
    clone = Clone(root / "undisturbed")
    try:
        url = clone.must("flows.server", "start").out.split()[-1]
        clone = Clone(clone.folder, {"PREFECT_API_URL": f"{url}/api"})
        with _forks(clone) as running:
            names = _shared_stages() if settings.is_short else all_stages()
            if not (root / "whole").exists():
                _finish(clone, running, names)
                (root / "whole").touch()
            yield Built(clone, tuple(names), digests(clone.artifacts)), running
    finally:
        clone.run("flows.server", "stop")


def _begin(root: Path) -> None:
    """Make a clone around a tiny parent, in place of one that was left unfinished."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    tiny_parent(root / "parent")
    tiny_documents(root / "documents")
    params = tiny_run_params(root / "parent", root / "documents")
    for section, fewer in _FEWER.items():
        params[section] |= fewer
    params["prepare_corpus"]["sources"].append({"kind": "written", "weight": 0.2})
    make_clone(root / "undisturbed", params)


def _finish(clone: Clone, running: Forks, names: Sequence[str]) -> None:
    """Run the stages once through DVC, with timings of this machine."""
    running.must(clone, "dvc", "repro", "prepare_parent")
    running.must(clone, "flows.cli", "time-machine", TIMINGS)
    running.must(clone, "dvc", "repro", *names)


def copy_of(built: Built, folder: Path) -> Clone:
    """Return a copy of the clone that shares its server, and nothing else."""
    shutil.copytree(built.clone.folder, folder, symlinks=True, ignore=shutil.ignore_patterns(".prefect", "tmp"))
    return Clone(folder, built.clone.environment)


def digests(artifacts: Path) -> dict[str, str]:
    """Say what every artifact holds, by its path: its bytes, or its values without those of clocks."""
    return {name: _digest(artifacts / name, name) for name in _names(artifacts)}


def differing(artifacts: Path, expected: Mapping[str, str]) -> list[str]:
    """Return artifacts that are missing, left over, or hold something else than they should."""
    actual = digests(artifacts)
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))


def _names(artifacts: Path) -> list[str]:
    return sorted(str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file())


def _digest(path: Path, name: str) -> str:
    if name.startswith(_DRAWN_FROM_CLOCKS):
        return "drawn"
    if path.name not in _WITHOUT_CLOCK:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        return _timeless(path)
    except (ValueError, OSError) as error:
        return f"unreadable: {error}"


def _timeless(path: Path) -> str:
    """Return the values of a file without those of clocks, as text."""
    if path.name == "seconds.json":
        return "seconds"
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        kept = [name for name in table.column_names if name not in _TIMED_COLUMNS]
        return json.dumps(table.select(kept).to_pylist())
    return json.dumps(_without_clocks(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clocks(part) for key, part in value.items() if key not in _CLOCKS}
    return [_without_clocks(part) for part in value] if isinstance(value, list) else value


@contextmanager
def _forks(clone: Clone) -> Iterator[Forks]:
    """Import the code of the clone and of DVC in a process of its own; `python` of what it forks is a fork as well."""
    modules = [*_DVC, "flows.cli", *(f"flows.{stage.name}" for stage in PIPELINE)]
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        address, script = f"{folder}/socket", Path(forks.__file__)
        python = Path(folder) / "python"
        asking = [sys.executable, "-IS", str(script), "ask", address]
        python.write_text(f'#!/bin/sh\nexec {shlex.join(asking)} "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        environment = {**clone.all_variables(), "PYTHONPATH": str(clone.folder), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, str(script), "serve", address, *modules],
            cwd=clone.folder.parent,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield Forks(address)
        finally:
            process.kill()
            process.wait()


def all_stages() -> list[str]:
    """Return every stage as `dvc repro` names it: `stage`, or `stage@target`; in the order of the work."""
    return [
        f"{stage.name}@{target}" if target else stage.name
        for stage in PIPELINE
        for target in (TARGETS if stage.per_target else (None,))
    ]


def _shared_stages() -> list[str]:
    """Return the stages that read no artifact of a target, in the order of the work."""
    return [stage.name for stage in PIPELINE if not any("children" in path for path in (*stage.deps, *stage.outs))]
