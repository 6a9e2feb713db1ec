"""Runs DVC under a flow: one at a time, its output in the run's log, its stages as progress; it ends with the run.

What DVC starts inherits the address of the server that this run uses, so that no stage starts a second one.
"""

import contextlib
import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from prefect.settings import PREFECT_API_URL

from flows import HOME
from flows.orphans import RUNNING
from flows.progress import PIECES, ProgressArtifact
from flows.ui.dvc_progress import DvcProgress
from storage.files import InputError

_STARTED_BY = os.getppid()
_BUSY = ("Unable to acquire lock", "is busy, it is being blocked by")


class BusyError(InputError):
    """Another run of DVC is at work in this clone."""


@contextlib.contextmanager
def only_one(name: str, *, wait: bool) -> Iterator[None]:
    """Hold the clone's lock of this name; without `wait`, BusyError if another process holds it."""
    HOME.mkdir(exist_ok=True)
    with (HOME / f"{name}.lock").open("w") as handle:
        has_waited = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    raise BusyError(f"another process holds {HOME / name}.lock; wait until it ends") from None
            if not has_waited:
                get_run_logger().info("another run is at work in this clone; this one begins when it ends")
                has_waited = True
            time.sleep(0.5)
        yield


def stale() -> dict[str, Any]:
    """Return the answer of `dvc status --json`: stage -> what changed."""
    changes: dict[str, Any] = json.loads(_output("status", "--json"))
    return changes


def would_run(*arguments: str) -> list[str]:
    """Return the stages that `dvc repro --force <arguments>` would run, in order: a part of the graph."""
    lines = _output("repro", "--dry", "--force", *arguments).splitlines()
    return [line.split("'")[1] for line in lines if line.startswith("Running stage")]


def _output(*arguments: str) -> str:
    """Return the stdout of a `dvc` command that takes a moment."""
    ended = subprocess.run(_command(*arguments), env=_environment(), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise _failure([*ended.stderr.splitlines()], ended.returncode)
    return ended.stdout


def run_dvc(arguments: list[str], ahead: list[str]) -> None:
    """Run `dvc <arguments>` to its end, with progress over the stages `ahead` of it.

    Raises:
        InputError: it failed; the message is the failing stage's own.
    """
    logger = get_run_logger()
    logger.info("dvc %s", " ".join(arguments))
    progress, artifact = DvcProgress(list(ahead), _usual_seconds(ahead)), ProgressArtifact("progress")
    output: list[str] = []
    with _child(arguments) as process:
        for line in _lines(process):
            if line:
                logger.info(line)
                output.append(line)
                progress.read(line, time.monotonic())
            if os.getppid() != _STARTED_BY:
                raise InputError("what started this run (`make serve`, a worker) was killed; finished pieces stay")
            if artifact.is_due():
                percent, pieces = _pieces(progress)
                artifact.show(progress.percent(percent), progress.text(percent, pieces, time.monotonic()))
        code = process.wait()
    if code:
        raise _failure(output, code)
    progress.finish(time.monotonic())
    artifact.show(100.0, f"{len(progress.done)}/{len(progress.ahead)} stages, done")


@contextlib.contextmanager
def _child(arguments: list[str]) -> "Iterator[subprocess.Popen[str]]":
    """Run `dvc` in a process group that ends with this block, or with this process if somebody kills it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.ui.guard", *_command(*arguments)],
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def _lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    """Yield lines as they come, and an empty one for every second without."""
    waiting: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            waiting.put(line.rstrip())
        waiting.put(None)

    threading.Thread(target=pump, daemon=True).start()
    while True:
        try:
            line = waiting.get(timeout=1.0)
        except queue.Empty:
            line = ""
        if line is None:
            return
        yield line


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _environment() -> dict[str, str]:
    """Return the environment of DVC's stages: this run's server and record of runs, no variables of this run alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}
    address = {"PREFECT_API_URL": PREFECT_API_URL.value(), "PUZZLE_RUNNING": str(RUNNING)}
    return {**environment, **address, "PYTHONUNBUFFERED": "1"}


def _failure(output: list[str], code: int) -> InputError:
    """Return DVC's errors and failing stages' messages, else the last lines; BusyError where DVC waits for a lock."""
    dvc_errors = [line for line in output if line.startswith("ERROR: ")]
    stage_errors: list[str] = []
    for line in output:
        if line.startswith("error: ") or (stage_errors and line.startswith("  ")):
            stage_errors.append(line)
    message = "\n".join([*dvc_errors, *stage_errors]) or "\n".join([line for line in output if line.strip()][-4:])
    message = message or f"dvc ended with exit code {code} and wrote nothing"
    is_busy = any(words in line for line in dvc_errors for words in _BUSY)
    return BusyError(message) if is_busy else InputError(message)


def _usual_seconds(stages: list[str]) -> dict[str, float]:
    """Return the seconds of each stage's last completed flow run on this server."""
    seconds: dict[str, float] = {}
    with get_client(sync_client=True) as client:
        for name in {stage.partition("@")[0] for stage in stages}:
            runs = client.read_flow_runs(
                flow_filter=of_flows(name),
                flow_run_filter=in_state(StateType.COMPLETED),
                sort=FlowRunSort.END_TIME_DESC,
                limit=1,
            )
            if runs:
                seconds[name] = runs[0].total_run_time.total_seconds()
    return {stage: seconds[name] for stage in stages if (name := stage.partition("@")[0]) in seconds}


def _pieces(progress: DvcProgress) -> tuple[float | None, str]:
    """Return percent and words of the progress artifact that the current stage's run shows for its pieces, if any."""
    began = datetime.now(UTC) - timedelta(seconds=time.monotonic() - progress.since)
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[PIECES])),
            flow_run_filter=in_state(StateType.RUNNING),
            sort=ArtifactSort.CREATED_DESC,
            limit=1,
        )
    for artifact in artifacts:
        if progress.current and artifact.created and artifact.created >= began:  # older: of a run that was killed
            return float(str(artifact.data)), artifact.description or ""
    return None, ""


def of_flows(*names: str) -> FlowFilter:
    """Return a filter for runs of these flows."""
    return FlowFilter(name=FlowFilterName(any_=list(names)))


def in_state(kind: StateType) -> FlowRunFilter:
    """Return a filter for flow runs in this state."""
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[kind])))
