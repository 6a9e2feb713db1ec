"""Runs programs that a model wrote, each in a process that can do no harm (confine.py).

In: a Python program and its limits. Out: whether it ran to its end without an error. What it prints goes nowhere, it
has no environment, and it may import the standard library only.
"""

import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from storage.files import InputError
from tasks.engines import confine

_START_S = 5.0
"""Seconds for two starts of Python on a busy machine, on top of a program's own."""
_PROBE = """
import os, socket, threading
def is_refused(attempt):
    try:
        attempt()
    except (OSError, MemoryError, RuntimeError):
        return True
    return False
attempts = [
    socket.socket,
    os.fork,
    threading.Thread(target=int).start,
    lambda: os.kill({pid}, 0),
    lambda: open({path!r}, "w"),
    lambda: os.rename({folder!r}, {path!r} + "s"),
    lambda: bytearray({memory_bytes}),
]
assert all(map(is_refused, attempts))
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds, of CPU time and by the clock, and MiB of memory."""

    seconds: int
    memory_mib: int

    @property
    def memory_bytes(self) -> int:
        """The memory in bytes."""
        return self.memory_mib << 20


def runs_to_its_end(program: str, limits: Limits) -> bool:
    """Whether a program ends without an error and within its limits; one that leaves early (`exit()`) does not.

    The last line of the program tells so over a pipe, with a word that is drawn for this run.
    """
    word = secrets.token_hex(16)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as verdict:
        try:
            source = f"{program}\n__import__('os').write({writer}, b'{word}')\n"
            subprocess.run(
                [sys.executable, "-I", "-S", confine.__file__, str(limits.seconds), str(limits.memory_bytes)],
                input=source.encode("utf-8", "replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=limits.seconds + _START_S,
                env={},
                cwd="/",
                pass_fds=(writer,),
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        finally:
            os.close(writer)
        return verdict.read(len(word) + 1) == word.encode()


def check_confinement(limits: Limits) -> None:
    """Try on this machine whether a confined program is refused all that could do harm.

    Raises:
        InputError: it is not, so no program of a model may run here.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "written"))
        probe = _PROBE.format(pid=os.getpid(), path=path, folder=folder, memory_bytes=2 * limits.memory_bytes)
        if not runs_to_its_end(probe, limits):
            raise InputError(
                f"measure_accuracy.human_eval runs programs that a model writes, and this machine ({sys.platform}, "
                f"{os.uname().machine}) cannot keep them from network, processes and files (seccomp of Linux on x86_64 "
                "or aarch64 is needed); take human_eval out of params.yaml, or run the stage on a machine that can"
            )
