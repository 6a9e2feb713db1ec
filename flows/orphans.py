"""Runs of stages whose process was killed: the next stage, or `make serve`, marks them as crashed.

The process of a run holds a lock `.prefect/running/<run>.lock` until it ends, in whatever way; the server alone would
call the run Running for ever. Stages of `dvc exp run --temp`, whose folder DVC removes, keep theirs in the clone whose
server they use: flows/ui/repro.py names it in PUZZLE_RUNNING.
"""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import State
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows import HOME

RUNNING = Path(os.environ.get("PUZZLE_RUNNING") or HOME / "running")
_locks: list[TextIO] = []


def hold(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Keep on record that this process runs a flow: Prefect calls it when a run begins."""
    RUNNING.mkdir(parents=True, exist_ok=True)
    named_later = RUNNING / f".{flow_run.id}"
    handle = named_later.open("w")
    fcntl.flock(handle, fcntl.LOCK_EX)
    named_later.replace(RUNNING / f"{flow_run.id}.lock")
    _locks.append(handle)


def release() -> None:
    """Take what this process holds off the record: its runs have ended, and Prefect knows how."""
    while _locks:
        handle = _locks.pop()
        (RUNNING / f"{handle.name.rpartition('/.')[2]}.lock").unlink(missing_ok=True)
        handle.close()


def abandon() -> None:
    """Leave on record what this process holds, as a run whose end the server never heard of: an orphan from now on."""
    while _locks:
        _locks.pop().close()


def close_orphans() -> None:
    """Mark as crashed what the server calls running and no process holds."""
    with get_client(sync_client=True) as client:
        for path in sorted(RUNNING.glob("*.lock")):
            if (run_id := _run_id(path)) is None:
                continue
            with contextlib.suppress(FileNotFoundError, BlockingIOError, ObjectNotFound), path.open("r+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _crash(client, run_id)  # not found: it is another server's
                path.unlink()


def crash_lost_tasks() -> None:
    """Mark as crashed the tasks of this process's runs whose workers were killed: they said nothing of their end."""
    with get_client(sync_client=True) as client:
        for handle in _locks:
            _crash_tasks(client, UUID(handle.name.rpartition("/.")[2]), "the worker was killed")


def _run_id(path: Path) -> UUID | None:
    """Return the run that a lock is of, None for a file of somebody else's."""
    try:
        return UUID(path.stem)
    except ValueError:
        return None


def _crash(client: SyncPrefectClient, run_id: UUID) -> None:
    ended: State[Any] = Crashed(message="the process of this run was killed; finished pieces stay")
    run = client.read_flow_run(run_id)
    if run.state is None or run.state.is_final():
        return
    client.set_flow_run_state(run.id, ended, force=True)
    _crash_tasks(client, run.id, ended.message)


def _crash_tasks(client: SyncPrefectClient, flow_run: UUID, message: str | None) -> None:
    """Mark the tasks of a run that the server does not know the end of as crashed."""
    ended: State[Any] = Crashed(message=message)
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
    for task_run in client.read_task_runs(flow_run_filter=of_run):
        if task_run.state is not None and not task_run.state.is_final():
            client.set_task_run_state(task_run.id, ended, force=True)
