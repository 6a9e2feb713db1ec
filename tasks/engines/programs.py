"""Runs programs that a model wrote, each in a process that can do no harm (confine.py).

In: a Python program and its limits. Out: whether it ran to its end without an error. What it prints goes nowhere, it
has no environment, and it may import the standard library only. While it runs, this process's own memory and
environment are closed to it.
"""

import contextlib
import ctypes
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.files import InputError
from tasks.engines import confine

_START_S = 5.0
"""Seconds for two starts of Python on a busy machine, on top of a program's own."""
_GET_DUMPABLE, _SET_DUMPABLE = 3, 4
_PROBE = """
import fcntl, os, socket, threading
def is_refused(attempt):
    try:
        attempt()
    except (OSError, MemoryError, RuntimeError):
        return True
    return False
attempts = {{
    "a socket": socket.socket,
    "a process": lambda: os.fork() or os._exit(0),
    "a thread": threading.Thread(target=int).start,
    "a signal": lambda: os.kill({pid}, 0),
    "a signal of a pipe": lambda: fcntl.fcntl(0, fcntl.F_SETOWN, {pid}),
    "the environment of another process": lambda: open("/proc/{pid}/environ", "rb").read(1),
    "the memory of another process": lambda: open("/proc/{pid}/mem", "rb"),
    "writing a file": lambda: open({path!r}, "a"),
    "renaming a file": lambda: os.rename({path!r}, {path!r} + "s"),
    "more memory": lambda: bytearray({memory_bytes}),
}}
allowed = [name for name, attempt in attempts.items() if not is_refused(attempt)]
os.write({writer}, ", ".join(allowed or ["nothing"]).encode())
"""


@dataclass(frozen=True)
class Limits:
    """The limits of a program: seconds, of CPU time and by the clock, and MiB of memory."""

    seconds: int
    memory_mib: int

    @property
    def memory_bytes(self) -> int:
        """Return the memory in bytes."""
        return self.memory_mib << 20


def runs_to_its_end(program: str, limits: Limits) -> bool:
    """Tell whether a program ends without an error and within its limits; one that leaves early (`exit()`) does not.

    The last line of the program tells so over a pipe, with a word that is drawn for this run. The word keeps a program
    from passing by chance or by writing to whatever is open; one that reads it out of its own source can still pass.
    """
    word = secrets.token_hex(16)
    try:
        written = _written(lambda writer: f"{program}\n__import__('os').write({writer}, b'{word}')\n", limits)
    except subprocess.TimeoutExpired:
        return False
    return written == word.encode()


def _written(source: Callable[[int], str], limits: Limits) -> bytes:
    """Run a program; return the first of what it wrote to the descriptor that its `source` is made with.

    Raises:
        subprocess.TimeoutExpired: it had not ended in time, and was killed.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as verdict:
        try:
            with _closed_to_others():
                subprocess.run(
                    [sys.executable, "-I", "-S", confine.__file__, str(limits.seconds), str(limits.memory_bytes)],
                    input=source(writer).encode("utf-8", "replace"),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=limits.seconds + _START_S,
                    env={},
                    cwd="/",
                    pass_fds=(writer,),
                    start_new_session=True,
                    check=False,
                )
        finally:
            os.close(writer)
        return verdict.read(1024)


@contextlib.contextmanager
def _closed_to_others() -> Iterator[None]:
    """Keep other processes of the same user from this one's memory and environment, in /proc, for a while."""
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    before = prctl(_GET_DUMPABLE, 0, 0, 0, 0)
    prctl(_SET_DUMPABLE, 0, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_SET_DUMPABLE, before, 0, 0, 0)


def check_confinement(limits: Limits) -> None:
    """Try on this machine whether a confined program is refused all that could do harm.

    Raises:
        InputError: it is not, so no program of a model may run here.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kept")
        path.touch()
        names = {"pid": os.getpid(), "path": str(path), "memory_bytes": 2 * limits.memory_bytes}
        try:
            allowed = _written(lambda writer: _PROBE.format(writer=writer, **names), limits).decode()
        except subprocess.TimeoutExpired:
            raise InputError(
                f"measure_accuracy.human_eval: a first program had not ended after {limits.seconds + _START_S:.0f} s; "
                "run the stage on a machine that is less busy, or raise seconds"
            ) from None
    if allowed != "nothing":
        raise InputError(
            f"measure_accuracy.human_eval runs programs that a model writes, and this machine ({sys.platform}, "
            f"{os.uname().machine}) does not keep them from {allowed or 'anything: none can be confined'} (seccomp of "
            "Linux on x86_64 or aarch64 is needed); take human_eval out of params.yaml, or run the stage on a machine "
            "that does"
        )
