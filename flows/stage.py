"""The common part of all stages' flows: arguments, params, server, workers, progress, and errors as one message."""

import argparse
import contextlib
import fcntl
import gc
import inspect
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from httpx import TransportError
from prefect import Flow, Task
from prefect.events.clients import PrefectCloudEventsClient, PrefectEventsClient
from prefect.events.worker import EventsWorker, emit_events_to_cloud
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner
from tqdm import tqdm

from flows import HOME_NAME
from flows.durations import duration_text
from flows.errors import run_cleanly
from flows.orphans import abandon, close_orphans, crash_lost_tasks, hold, release
from flows.progress import PIECES, ProgressArtifact
from flows.server import ensure
from flows.workers import LostPieceError, Workers, take_devices, workers_of
from storage.files import InputError, have_cached_copy_checked, write_sealed
from storage.params import Params, load
from storage.parent_info import read_parent_info
from storage.paths import Paths
from storage.pipeline import read_pipeline, read_seconds

_BEGAN = time.monotonic()
_LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_CHECKS = 2.0
_SMALL = {"measure_costs", "search_architecture", "search_baselines", "report"}
"""Stages that hold no tensors, and start without torch."""
_WORKERS: ContextVar[Workers | None] = ContextVar("workers", default=None)
"""The workers of the stage that runs; None: threads of its flow."""


def main(stage: Flow[..., Any]) -> None:
    """Run a stage as dvc.yaml does: `python -m flows.<stage> [--target TARGET]`."""
    parser = argparse.ArgumentParser(prog=f"python -m flows.{stage.name}", description=stage.description)
    parser.add_argument("--target", help="key of the target in params.yaml; of stages that run per target alone")
    target = parser.parse_args().target
    logging.raiseExceptions = False  # where the server dies, Prefect would write that its log reaches nobody
    run_cleanly(lambda: run_stage(stage, target))
    gc.freeze()  # the process ends here: what torch and prefect made need not be looked through once more


def run_stage(stage: Flow[..., Any], target: str | None) -> None:
    """Run a stage's flow with the params of the working directory; pieces that were finished before stay.

    Where this clone's server dies meanwhile, another one is started and the flow run again, which takes those pieces.

    Args:
        stage: flow of params and paths, and of a target where the stage runs per target.
        target: key of the target, None for a stage that all targets share.

    Raises:
        InputError: a wrong input, also a target that is missing, unknown, or not the stage's business; the stage runs
            in this folder already; or a server of PREFECT_API_URL no longer answers.
    """
    params = load()
    _check_target(stage, target, params)
    name = stage.name if target is None else f"{stage.name}@{target}"
    take_devices(params)
    _check_memory(stage.name, params, Paths())
    with _alone(name):
        _run_resumed(stage, params, {} if target is None else {"target": target})
        _have_cache_checked(stage.name, target)
        _record(name, time.monotonic() - _BEGAN, Paths())


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Keep others from running this stage here at the same time: they would delete the pieces under way."""
    folder = Path(HOME_NAME)  # beside the artifacts
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.stage").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{name} runs in {Path.cwd()} already; wait for its end, or stop it") from None
        yield


def _run_resumed(stage: Flow[..., Any], params: Params, arguments: dict[str, str]) -> None:
    """Run the flow; where nodes of a cluster were lost, run it again for the pieces that they had not finished."""
    lost = None
    while True:
        try:
            return _run_served(stage, params, arguments)
        except LostPiecesError as error:
            if params.execution.runner != "ray" or (lost is not None and error.count >= lost):
                raise
            lost = error.count
            _LOG.warning("%s goes on: %s", stage.name, error)


def _run_served(stage: Flow[..., Any], params: Params, arguments: dict[str, str]) -> None:
    """Run the flow on this clone's server, once more on another one where it dies."""
    url, _ = ensure()
    try:
        _run_tracked(stage, params, arguments, url)
    except TransportError as error:
        if os.environ.get("PREFECT_API_URL"):
            raise _unanswered(url, error) from error
        url, _ = ensure()
        try:
            _run_tracked(stage, params, arguments, url)
        except TransportError as second_error:
            raise _unanswered(url, second_error) from second_error


def _run_tracked(stage: Flow[..., Any], params: Params, arguments: dict[str, str], url: str) -> None:
    """Run the flow on the server at `url`.

    Raises:
        TransportError: the server died, or was stopped; finished pieces stay.
    """
    with temporary_settings({PREFECT_API_URL: url}):
        # Of Prefect's ten attempts the last seven wait a second: for every event, and there are three of each piece.
        client = PrefectCloudEventsClient if emit_events_to_cloud() else PrefectEventsClient
        EventsWorker.set_client_override(client, api_url=url, reconnection_attempts=3)
        try:
            close_orphans()
            tracked_stage = stage.with_options(task_runner=threads(params.run.workers), on_running=[hold])
            with workers_of(params) as workers, _on(workers):
                tracked_stage(params=params, paths=Paths(storage=params.storage), **arguments)
        except LostPiecesError:
            crash_lost_tasks()
            raise
        except TransportError:
            abandon()
            raise
        finally:
            release()


def _unanswered(url: str, error: TransportError) -> InputError:
    return InputError(
        f"the Prefect server at {url} no longer answers ({error}); run the same command again: finished pieces stay"
    )


def _check_target(stage: Flow[..., Any], target: str | None, params: Params) -> None:
    is_per_target = "target" in inspect.signature(stage.fn).parameters
    if target is None and is_per_target:
        raise InputError(f"{stage.name} runs per target; add --target with one of {', '.join(params.targets)}")
    if target is not None and not is_per_target:
        raise InputError(f"{stage.name} is the same for all targets; leave --target out")
    if target is not None:
        params.target(target)


def _check_memory(name: str, params: Params, paths: Paths) -> None:
    """Refuse a stage that does not fit this machine, or that comes before one that does not.

    Raises:
        InputError: it does not fit; the message has bytes.
    """
    if name in _SMALL:
        return
    from tasks.engines.machine import memory_of, on_this_machine  # these import torch
    from tasks.estimates.memory import check_memory
    from tasks.estimates.parent_geometry import parent_geometry

    params = on_this_machine(params)
    try:
        pipeline = read_pipeline()
        if name == pipeline[0].name:
            _, config = parent_geometry(params.prepare_parent.source)
        else:
            config = read_parent_info(paths.parent).config
    except InputError:  # the stage itself says what is wrong; a parent from the hub is not here yet
        return
    check_memory(name, pipeline, config, params, memory_of(params.run.device))


def _have_cache_checked(name: str, target: str | None) -> None:
    """Have DVC read what its cache has of the artifacts that a stage wrote."""
    with contextlib.suppress(InputError):  # dvc.yaml is DVC's business
        outs = [out for stage in read_pipeline() if stage.name == name for out in stage.outs]
        for out in outs:
            have_cached_copy_checked(Path(out.replace("${key}", target or "")))


def _record(name: str, seconds: float, paths: Paths) -> None:
    """Keep how long a stage took, which `puzzle plan` shows beside its estimates."""
    with contextlib.suppress(InputError, OSError):  # the stage has done its work, and nothing needs the record
        write_sealed(paths.seconds, {**read_seconds(paths.seconds), name: seconds})


def threads(count: int) -> Any:
    """Return the runner of a flow: threads of this process (torch releases the GIL in every kernel)."""
    return ThreadPoolTaskRunner(max_workers=count)


@contextlib.contextmanager
def _on(workers: Workers) -> Iterator[None]:
    """Have :func:`run_pieces` take these workers."""
    token = _WORKERS.set(workers)
    try:
        yield
    finally:
        _WORKERS.reset(token)


class LostPiecesError(InputError):
    """Workers were killed before they finished `count` pieces; all others are finished."""

    def __init__(self, count: int, total: int, unit: str, reason: object) -> None:
        super().__init__(
            f"{count} of {total} pieces ({unit}) were lost with their workers: {reason}; run the same command again: "
            "finished pieces stay"
        )
        self.count = count


def run_pieces(
    work: Task[..., Any],
    pieces: Sequence[Any],
    *common: Any,
    unit: str,
    in_order: bool = False,
    in_memory: bool = False,
) -> list[Any]:
    """Run `work(piece, *common)` for every piece on the stage's workers, with done/total and time left.

    A terminal shows them as a bar, the UI as an artifact of the stage's run. The first failure ends the stage; pieces
    that were finished stay, and the next run takes them.

    Args:
        work: task of a piece and of what all pieces share.
        pieces: first argument of `work`, each.
        common: further arguments of `work`.
        unit: word for a piece, for the bar.
        in_order: start a piece when the one before it has ended.
        in_memory: `common` holds what this process has in memory, which threads alone can share.

    Returns the results in the order of the pieces.

    Raises:
        LostPiecesError: workers were killed; the pieces of all others have ended.
    """
    workers = (None if in_memory else _WORKERS.get()) or Workers()
    futures: list[PrefectFuture[Any]] = []
    began, artifact, total = time.monotonic(), ProgressArtifact(PIECES), len(pieces)
    lost: list[LostPieceError] = []
    results: dict[PrefectFuture[Any], Any] = {}
    bar = tqdm(
        _ended(workers, work, pieces, common, futures, in_order), total=total, desc=work.name, unit=unit, disable=None
    )
    for done, future in enumerate(bar, start=1):
        try:
            results[future] = workers.result(future)
        except LostPieceError as error:
            lost.append(error)
        if artifact.is_due() or done == total:
            seconds_left = (time.monotonic() - began) * (total - done) / done
            artifact.show(100 * done / total, f"{unit} {done}/{total}, about {duration_text(seconds_left)} left")
    if lost:
        raise LostPiecesError(len(lost), total, unit, lost[0])
    return [results[future] for future in futures]


def _ended(
    workers: Workers,
    work: Task[..., Any],
    pieces: Sequence[Any],
    common: tuple[Any, ...],
    futures: list[PrefectFuture[Any]],
    in_order: bool,
) -> Iterator[PrefectFuture[Any]]:
    """Submit the pieces, append their futures to `futures`, and yield those as they end."""
    ended: SimpleQueue[PrefectFuture[Any]] = SimpleQueue()

    def next_one() -> PrefectFuture[Any]:
        while True:
            try:
                return ended.get(timeout=_SECONDS_BETWEEN_CHECKS)
            except Empty:
                workers.check()

    for piece in pieces:
        futures.append(workers.submit(work, piece, *common))
        futures[-1].add_done_callback(ended.put)
        if in_order:
            yield next_one()
    if not in_order:
        for _ in pieces:
            yield next_one()
