"""Ranks of a distillation as processes that import nothing anew, and what a test changes in each of them."""

import io
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from storage.files import InputError
from storage.params import Params
from storage.paths import Paths
from tasks.gkd import launch, ranks

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])

Change = Callable[[int], None]
"""Called in each rank with its number before it trains; a function of a module."""


@dataclass(frozen=True)
class Ended:
    """The end of all ranks: exit codes, what rank 0 printed, and the messages of wrong inputs."""

    codes: list[int | None]
    lines: list[str]
    errors: list[str]


def run_ranks(count: int, params: Params, paths: Paths, change: Change | None = None) -> Ended:
    """Train target `small` on some ranks, to their end."""
    scratch = paths.root / "ranks"
    scratch.mkdir(exist_ok=True)
    errors = _CONTEXT.SimpleQueue()
    with launch._listening() as (port, _store):
        arguments = (count, port, params, paths, change, scratch / "lines.txt", errors)
        processes = [_CONTEXT.Process(target=_rank, args=(rank, *arguments)) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    messages = []
    while not errors.empty():
        messages.append(errors.get())
    lines = (scratch / "lines.txt").read_text(encoding="utf-8").splitlines()
    return Ended([process.exitcode for process in processes], lines, messages)


def _rank(
    rank: int, count: int, port: int, params: Params, paths: Paths, change: Change | None, lines: Path, errors: Any
) -> None:
    """Be one rank, as torchrun starts it."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {**place, **address}
    torch.set_num_threads(1)
    sys.stderr = io.StringIO()  # what peers say of one that ended
    if rank == 0:
        sys.stdout = lines.open("w", encoding="utf-8")
    if change is not None:
        change(rank)
    try:
        ranks._train("small", params, paths)
    except InputError as error:
        errors.put(str(error))
        sys.exit(error.exit_code)
    sys.stdout.flush()
