"""A finished clone to do harm to: made once, copied, compared with its copies without what clocks wrote."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from storage.pipeline import PipelineStage, overlap, read_pipeline
from tests.clone import ROOT, TIMINGS, Clone, Ended, make_clone, tiny_documents, tiny_parent, tiny_run_params
from tests.faults.outcomes import Settings

PIPELINE = read_pipeline(ROOT / "dvc.yaml")
_FIRST_STAGES = (
    *("prepare_parent", "export_parent", "prepare_corpus", "cache_activations", "distill_blocks", "score_blocks"),
)
BUILD_SECONDS = 600
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
        """The stages whose deps are, hold, or lie within an artifact."""
        return [stage for stage in self.stages if _has(name, stage, lambda row: row.deps)]

    def makers(self, name: str) -> list[str]:
        """The stages that make an artifact: one, or none."""
        return [stage for stage in self.stages if _has(name, stage, lambda row: row.outs)]


def _has(name: str, stage: str, paths: Callable[[PipelineStage], tuple[str, ...]]) -> bool:
    kind, _, target = stage.partition("@")
    rows = (row for row in PIPELINE if row.name == kind)
    return any(overlap(f"artifacts/{name}", path.replace("${key}", target)) for row in rows for path in paths(row))


@dataclass(frozen=True)
class Stages:
    """Stages of a clone, run in forks of one process that has imported its code."""

    process: "subprocess.Popen[str]"

    def run(self, clone: Clone, stage: str, seconds: float) -> Ended | None:
        """Run `stage` or `stage@target` in a copy of the clone; None if it was killed after so many seconds."""
        name, _, target = stage.partition("@")
        job = {"folder": str(clone.folder), "stage": name, "target": target or None, "seconds": seconds}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        ended = json.loads(self.process.stdout.readline())
        return ended and Ended(*ended)


@contextmanager
def built_clone(settings: Settings) -> Iterator[tuple[Built, Stages]]:
    """A clone in which stages ran, its server, which copies use as well, and its stages to run once more in copies.

    It is made in `<scratch>/base` where that holds none; a short campaign has the first stages, which DVC did not run.
    """
    root = settings.scratch / "base"
    if not (root / "whole").exists():
        _begin(root)
    clone = Clone(root / "undisturbed")
    try:
        url = clone.must("flows.server", "start").out.split()[-1]
        clone = Clone(clone.folder, {"PREFECT_API_URL": f"{url}/api"})
        with _forked_stages(clone, root) as stages:
            names = _FIRST_STAGES if settings.is_short else all_stages()
            if not (root / "whole").exists():
                _finish(clone, stages, names, settings.is_short)
                (root / "whole").touch()
            yield Built(clone, tuple(names), digests(clone.artifacts)), stages
    finally:
        clone.run("flows.server", "stop")


def _begin(root: Path) -> None:
    """Make a clone around a tiny parent."""
    root.mkdir(parents=True)
    tiny_parent(root / "parent")
    tiny_documents(root / "documents")
    make_clone(root / "undisturbed", tiny_run_params(root / "parent", root / "documents"))


def _finish(clone: Clone, stages: Stages, names: Sequence[str], is_short: bool) -> None:
    """Run the stages once: with timings of this machine and through DVC, or the first ones as they are."""
    if not is_short:
        clone.must("dvc", "repro", "prepare_parent")
        clone.must("flows.cli", "time-machine", TIMINGS)
        clone.must("dvc", "repro")
        return
    for name in names:
        ended = stages.run(clone, name, BUILD_SECONDS)
        assert ended and ended.code == 0, ended


def copy_of(built: Built, folder: Path) -> Clone:
    """A copy of the clone that shares its server, and nothing else."""
    shutil.copytree(built.clone.folder, folder, symlinks=True, ignore=shutil.ignore_patterns(".prefect", "tmp"))
    return Clone(folder, built.clone.environment)


def digests(artifacts: Path) -> dict[str, str]:
    """What every artifact holds, by its path: its bytes, or its values without those of clocks."""
    return {name: _digest(artifacts / name, name) for name in _names(artifacts)}


def differing(artifacts: Path, expected: Mapping[str, str]) -> list[str]:
    """Artifacts that are missing, left over, or hold something else than they should."""
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
    """The values of a file without those of clocks, as text."""
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
def _forked_stages(clone: Clone, root: Path) -> Iterator[Stages]:
    """Import the clone's stages in a process of their own."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forks.py")), *(stage.name for stage in PIPELINE)],
        cwd=root,
        env={**os.environ, **clone.environment, "PYTHONPATH": str(clone.folder), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Stages(process)
    finally:
        process.kill()
        process.wait()


def all_stages() -> list[str]:
    """Every stage as `dvc repro` names it: `stage`, or `stage@target`; in the order of the work."""
    return [
        f"{stage.name}@{target}" if target else stage.name
        for stage in PIPELINE
        for target in (TARGETS if stage.per_target else (None,))
    ]
