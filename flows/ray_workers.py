"""Workers on the nodes of a Ray cluster, through prefect-ray (extra `ray`); the stage's process is one of its drivers.

The head of the cluster and the workers are watched, so that what cannot go on ends with one sentence: Ray itself waits
for ever for a node that could take a piece, and ends its drivers without a word to them when its head is gone.
"""

import contextlib
import logging
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from prefect import Task
from prefect.events.worker import EventsWorker
from prefect.futures import PrefectFuture
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL
from prefect.task_runners import TaskRunner
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from ray.exceptions import RayError, RayTaskError

from flows import HOME_NAME
from flows.ray_node import Home, code_here, enter
from flows.workers import LostPieceError, RunnerWorkers
from storage.files import InputError
from storage.params import Params
from storage.sources import PACKAGES
from tasks.engines.machine import on_this_machine

_CONNECT_SECONDS = 5.0
_JOIN_SECONDS = 60.0
_SILENT_SECONDS = 20.0
"""How long the head may not answer: after a minute Ray ends this process."""
_GIB = 2**30


@contextlib.contextmanager
def ray_workers(params: Params) -> Iterator["RayWorkers"]:
    """Yield the workers of the cluster at `execution.address`.

    Raises:
        InputError: there is no cluster, this machine is none of its nodes, or none of its nodes can hold a piece.
    """
    assert params.execution.address is not None  # checked with the params
    needs = needed(params)
    mark = Path(HOME_NAME) / f"shared.{uuid.uuid4()}"
    mark.touch()
    try:
        _join(params.execution.address)
        home = Home(Path.cwd(), str(mark), code_here(), PREFECT_API_URL.value() or "", socket.gethostname())
        with _runner_at(home) as runner:
            workers = RayWorkers(runner, params.execution.address, needs)
            workers.must_hold_a_piece()
            yield workers
    finally:
        mark.unlink()
        if ray.is_initialized():
            ray.shutdown()


def needed(params: Params) -> dict[str, float]:
    """Return what Ray sets aside for a piece: CPU, GPU and memory (bytes), by Ray's names."""
    execution, run = params.execution, on_this_machine(params).run
    gpus = 0.0 if run.device == "cpu" else 1 / run.workers
    needs = {
        "CPU": run.threads if execution.cpus is None else execution.cpus,
        "GPU": gpus if execution.gpus is None else execution.gpus,
        "memory": (execution.memory_gib or 0) * _GIB,
    }
    return {name: amount for name, amount in needs.items() if amount}


def _join(address: str) -> None:
    """Make this process a driver of the cluster.

    Raises:
        InputError: nothing answers at the address, or nothing that takes this machine as one of its nodes.
    """
    if (error := _silence(address)) is not None:
        raise InputError(
            f"no Ray cluster answers at execution.address = {address} ({error}); start its head there with "
            f"`ray start --head --port {address.rpartition(':')[2]}`, or name another one"
        )
    outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def join() -> None:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, namespace="puzzle")
        except Exception as error:  # of any kind: raised below, in the stage's thread
            outcome.put(error)
            raise SystemExit from error  # which ends this one without a word
        outcome.put(None)

    with _silent():
        threading.Thread(target=join, daemon=True).start()  # what it waits for has no limit of its own
        try:
            error_of_ray = outcome.get(timeout=_JOIN_SECONDS)
        except queue.Empty:
            error_of_ray = TimeoutError(f"no answer within {_JOIN_SECONDS:.0f} s")
    if error_of_ray is not None:
        first_line = str(error_of_ray).partition("\n")[0] or type(error_of_ray).__name__
        raise InputError(
            f"Ray at {address} does not take this process ({first_line:.300}); is it Ray's head, is this machine a "
            f"node (`ray start --address {address}`), and has this process the head's RAY_AUTH_MODE and token?"
        ) from error_of_ray


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what is written to this process's stderr: Ray's own code writes there, each second that it waits."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _silence(address: str) -> str | None:
    """Return why nothing answers at an address, None where something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last: a host with a part that DNS does not take
        return str(error)
    return None


def _runner_at(home: Home) -> Any:
    """Return prefect-ray's runner, whose tasks begin in the clone's folder and tell Prefect how they ended."""

    def run(*references: Any, **arguments: Any) -> Any:
        enter(home)
        state = RayTaskRunner._run_prefect_task(*references, **arguments)
        for telling in (EventsWorker, APILogWorker):
            telling.drain_all()  # when the stage ends, Ray kills this process
        return state

    runner = RayTaskRunner()
    runner._run_prefect_task = run
    return runner


class RayWorkers(RunnerWorkers):
    """Workers on all nodes of a cluster, those that join it later as well."""

    def __init__(self, runner: TaskRunner[Any], address: str, needs: dict[str, float]) -> None:
        super().__init__(runner)
        self._address, self._needs = address, needs
        self._answered = time.monotonic()

    def submit(self, work: Task[..., Any], *arguments: Any) -> PrefectFuture[Any]:
        """Have a node that has room call the task; where it is lost, the plan of the next run says what is missing."""
        options = {
            "num_cpus": self._needs.get("CPU", 0),
            "num_gpus": self._needs.get("GPU", 0),
            "memory": self._needs.get("memory"),
            "max_retries": 0,
        }
        with remote_options(**options):
            return super().submit(work, *arguments)

    def result(self, future: PrefectFuture[Any]) -> Any:
        """Return what a task returned.

        Raises:
            InputError: its node does not have the clone as this machine has it.
            LostPieceError: its worker or node was killed.
        """
        try:
            return future.result()
        except RayTaskError as error:  # raised outside of Prefect's part
            if isinstance(error.cause, InputError):
                raise error.cause from None
            if missing := next((name for name in PACKAGES if f"No module named '{name}" in str(error)), None):
                raise InputError(
                    f"a Ray node does not see the package {missing!r} of {Path.cwd()}, or another version of it; put "
                    f"the clone on storage that all nodes mount at this path ({str(error).splitlines()[-1]:.200})"
                ) from error
            raise
        except RayError as error:
            raise LostPieceError(str(error).partition("\n")[0][:300]) from error

    def check(self) -> None:
        """See to it that the head answers and a node is left that can hold a piece."""
        if (error := _silence(self._address)) is None:
            self._answered = time.monotonic()
            self.must_hold_a_piece()
        elif time.monotonic() > self._answered + _SILENT_SECONDS:
            raise InputError(
                f"the head of the Ray cluster at {self._address} no longer answers ({error}); start the cluster anew, "
                "then run the same command again: finished pieces stay"
            )

    def must_hold_a_piece(self) -> None:
        """Raise InputError where no node is large enough for a piece."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= amount for name, amount in self._needs.items()) for node in nodes):
            needs = _words(self._needs)
            has = "; ".join(_words({name: node.get(name, 0) for name in self._needs}) for node in nodes) or "none"
            raise InputError(
                f"no node of the Ray cluster at {self._address} can hold a piece of {needs}; nodes: {has}; see cpus, "
                "gpus and memory_gib of execution"
            )


def _words(resources: dict[str, float]) -> str:
    """Return resources as people write them: 2 CPU, 0.5 GPU, 80.0 GiB."""
    return ", ".join(
        f"{amount / _GIB:.1f} GiB" if name == "memory" else f"{amount:g} {name}" for name, amount in resources.items()
    )
