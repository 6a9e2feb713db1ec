"""Starts the ranks of a global distillation on this machine, shows what they measure, and ends them together.

The ranks get the environment that torchrun gives (RANK, WORLD_SIZE, MASTER_ADDR, ...), so that the same module runs
under torchrun by hand; torchrun itself is not used since its rendezvous listens on all interfaces, where this one is
bound to 127.0.0.1. Where a rank ends early, the others are killed, and one message says which and what to do; ranks
look every half second whether this process still lives, so that none is left where it was killed.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Never

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from tqdm import tqdm

from storage.files import DamagedFileError, DiskFullError, InputError, read_json
from storage.gkd import GkdCurve
from storage.params import Params
from storage.paths import Paths
from storage.sources import SOURCES
from storage.variants import Replacement
from tasks.gkd import ranks as rank_module
from tasks.gkd.course import Course, Measurement, Watch
from tasks.gkd.material import material_of

_POLL_SECONDS = 0.1
_LOOPBACK = "127.0.0.1"
_ERRORS = {error.__name__: error for error in (InputError, DamagedFileError, DiskFullError)}
"""Errors that a rank explains itself."""


def train_on_ranks(
    target: str, replacements: Sequence[Replacement], params: Params, paths: Paths, watch: Watch
) -> tuple[GkdCurve, Iterator[dict[str, Tensor]]]:
    """Train a child on `distill_child.ranks` processes; what ranks on other machines finished is taken as it is.

    Returns the curve, and the best weights: tensors of each block, named as within a Llama layer.

    Raises:
        InputError: the training does not stay finite, a rank ended early, or there are fewer GPUs than ranks.
    """
    course = Course(target, params)
    checkpoint = rank_module.checkpoint_of(material_of(course, replacements, params, paths), target, paths)
    course.curve = checkpoint.curve() or course.curve
    if not course.is_finished:
        _check_devices(params)
        _run(target, params, paths, len(course.groups), watch)
        course.curve = checkpoint.curve() or course.curve
        assert course.is_finished
    return course.curve, checkpoint.best_blocks(len(replacements))


def _check_devices(params: Params) -> None:
    count, ranks = torch.cuda.device_count(), params.distill_child.ranks
    if params.run.device.startswith("cuda") and ranks > count:
        raise InputError(
            f"distill_child.ranks is {ranks}, a GPU each, but this machine has {count}; set fewer, or start the ranks "
            "on several machines (tasks/gkd/ranks.py says how)"
        )


def _run(target: str, params: Params, paths: Paths, num_steps: int, watch: Watch) -> None:
    """Run all ranks to their end."""
    ranks = params.distill_child.ranks
    with tempfile.TemporaryDirectory(prefix="gkd-") as folder, _listening() as (port, _store):
        scratch = Path(folder)
        (scratch / "params.json").write_text(params.model_dump_json(), encoding="utf-8")
        processes = list[subprocess.Popen[str]]()
        try:
            for rank in range(ranks):
                processes.append(_start(rank, ranks, port, target, scratch, paths))
            _follow(target, processes, scratch, num_steps, watch)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()


@contextlib.contextmanager
def _listening() -> Iterator[tuple[int, TCPStore]]:
    """Serve the ranks' rendezvous on a free port of this machine alone."""
    with socket.socket() as bound:
        bound.bind((_LOOPBACK, 0))
        bound.listen()
        port: int = bound.getsockname()[1]
        descriptor = os.dup(bound.fileno())  # the store closes it
    yield port, TCPStore(_LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def _start(rank: int, ranks: int, port: int, target: str, scratch: Path, paths: Paths) -> "subprocess.Popen[str]":
    """Start one rank; the first one's stdout is read, every one's stderr is a file."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = {
        **os.environ,
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        **{"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback, "TORCHELASTIC_RUN_ID": "gkd"},
        "TORCHELASTIC_ERROR_FILE": str(_error_file(scratch, rank)),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SOURCES), os.environ.get("PYTHONPATH")))),
    }
    arguments = ("--target", target, "--params", scratch / "params.json", "--artifacts", paths.root)
    with _stderr_file(scratch, rank).open("w", encoding="utf-8") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", rank_module.__name__, *map(str, arguments), "--parent", str(os.getpid())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=stderr,
            text=True,
        )


def _error_file(scratch: Path, rank: int) -> Path:
    return scratch / f"rank_{rank}.json"


def _stderr_file(scratch: Path, rank: int) -> Path:
    return scratch / f"rank_{rank}.txt"


def _follow(
    target: str, processes: Sequence["subprocess.Popen[str]"], scratch: Path, num_steps: int, watch: Watch
) -> None:
    """Show what rank 0 prints until all ranks have ended.

    Raises:
        InputError: a rank ended early; the others may still run.
    """
    assert processes[0].stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_forward, args=(processes[0].stdout, lines), daemon=True).start()
    progress: tqdm[Never] = tqdm(total=num_steps, desc="distill", unit="step", disable=None)
    with progress:
        while any(process.poll() is None for process in processes) or not lines.empty():
            if any(process.poll() for process in processes):
                raise _failure(target, processes, scratch)
            with contextlib.suppress(queue.Empty):
                _show(lines.get(timeout=_POLL_SECONDS), progress, watch)
    if any(process.returncode for process in processes):
        raise _failure(target, processes, scratch)


def _forward(source: IO[str], lines: "queue.SimpleQueue[str]") -> None:
    for line in source:
        lines.put(line)


def _show(line: str, progress: "tqdm[Never]", watch: Watch) -> None:
    """Take up a line of rank 0: steps that were done, or a measurement; what libraries print is left out."""
    if not line.startswith("{"):
        return
    message = json.loads(line)
    if "steps" in message:
        progress.update(message["steps"])
    else:
        measured = Measurement(**message)
        progress.set_postfix(kl=f"{measured.kl:.3f}")
        watch(measured)


def _failure(target: str, processes: Sequence["subprocess.Popen[str]"], scratch: Path) -> InputError:
    """Return the error of the rank that failed first: others fail since it no longer answers."""
    rebuild = f"run `dvc repro distill_child@{target}`, which goes on from the last checkpoint"
    ranks = range(len(processes))
    for rank in ranks:
        code = processes[rank].poll() or 0
        if code < 0:
            reason = " (memory may have run out)" if code == -signal.SIGKILL else ""
            return InputError(
                f"distill_child@{target}: rank {rank} of {len(ranks)} was ended by {signal.Signals(-code).name}{reason}"
                f", and the others with it; {rebuild}"
            )
    explained = [rank for rank in ranks if _error_file(scratch, rank).is_file()]
    if not explained:
        rank = next(rank for rank in ranks if processes[rank].poll())
        sys.stderr.write(_stderr_file(scratch, rank).read_text(encoding="utf-8"))
        return InputError(f"distill_child@{target}: rank {rank} of {len(ranks)} ended before it began; {rebuild}")
    first = min(explained, key=lambda rank: _error_file(scratch, rank).stat().st_mtime_ns)
    error = read_json(_error_file(scratch, first), rebuild)["message"]
    kind, _, text = str(error["message"]).partition(": ")
    if kind in _ERRORS:
        return _ERRORS[kind](text)
    sys.stderr.write(str(error["extraInfo"]["py_callstack"]))
    return InputError(f"distill_child@{target}: rank {first} of {len(ranks)} failed ({kind}: {text}); {rebuild}")
