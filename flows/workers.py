"""The workers of a stage: threads of its process, processes of this machine, or a Ray cluster (`execution.runner`).

A worker is given params, paths and a piece's name, no tensors; what it makes lies on disk, a sealed record last
(storage/pieces.py). So results are the same bytes whoever made them, and a worker that is lost leaves finished pieces.
"""

import importlib.util
import inspect
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from storage.files import InputError
from storage.params import Params
from tasks.engines.devices import chosen_gpus, keep, present_gpus, show_only, take_turn

_LOG = logging.getLogger(__name__)


class LostPieceError(Exception):
    """A worker ended before its piece did; the text says how."""


class Workers:
    """Workers that are threads of this process, those of the stage's flow."""

    def submit(self, work: Task[..., Any], *arguments: Any) -> PrefectFuture[Any]:
        """Have a worker call the task with these arguments."""
        return work.submit(*arguments)

    def result(self, future: PrefectFuture[Any]) -> Any:
        """Return what a task returned, or raise what it raised.

        Raises:
            LostPieceError: its worker was killed.
        """
        return future.result()

    def check(self) -> None:
        """Raise InputError where nobody will ever end the tasks that were submitted; called again and again."""


class RunnerWorkers(Workers):
    """Workers that one of Prefect's task runners has outside this process."""

    def __init__(self, runner: TaskRunner[Any]) -> None:
        self.runner = runner

    def submit(self, work: Task[..., Any], *arguments: Any) -> PrefectFuture[Any]:
        """Have a worker call the task with these arguments; they are pickled."""
        future: PrefectFuture[Any] = self.runner.submit(work, inspect.signature(work.fn).bind(*arguments).arguments)
        return future


class _Processes(RunnerWorkers):
    """Workers that are processes of this machine; where one is killed, all of them end."""

    def result(self, future: PrefectFuture[Any]) -> Any:
        """Return what a task returned."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise LostPieceError("a worker process was killed, for want of memory perhaps") from error


@contextmanager
def workers_of(params: Params) -> Iterator[Workers]:
    """Yield the workers that `execution` asks for; they end with the block.

    Raises:
        InputError: a GPU that is not there, or Ray is not installed.
    """
    match params.execution.runner:
        case "threads":
            if "torch" in sys.modules and params.run.device != "cpu" and len(gpus := present_gpus()) > 1:
                _LOG.warning("one of %d GPUs computes; execution.runner: processes takes all of them", len(gpus))
            yield Workers()
        case "processes":
            gpus = present_gpus() if params.run.device != "cpu" else ()
            runner = ProcessPoolTaskRunner(params.run.workers * max(len(gpus), 1), (), begin_worker, (gpus,))
            with runner:
                yield _Processes(runner)
        case "ray":
            if not all(importlib.util.find_spec(name) for name in ("ray", "prefect_ray")):
                raise InputError(
                    "execution.runner is ray, which is not installed; "
                    "run `pip install --constraint constraints.txt --editable '.[ray]'`"
                )
            from flows.ray_workers import ray_workers  # imports Ray

            with ray_workers(params) as workers:
                yield workers


def take_devices(params: Params) -> None:
    """Have this process, and what it starts, see the GPUs of `execution.devices` alone, before anything starts CUDA.

    Raises:
        InputError: a GPU that is not there.
    """
    if params.run.device != "cpu" and params.execution.devices != "auto":
        show_only(chosen_gpus(params.execution.devices, present_gpus()))


def begin_worker(gpus: Sequence[str]) -> None:
    """Begin a worker process: it ends when its stage's process does, and keeps the GPU that its number gives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the stage's process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpus:  # before Prefect gives this process the stage's own variables, as it does with each task
        keep(take_turn(gpus, multiprocessing.current_process().name))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
