"""Commands of a clone in forks of one process that has imported its code and DVC's: a second each, not five.

`serve SOCKET MODULE...` imports the modules and forks for every connection, with the clone's code first on PYTHONPATH:
a line of JSON in, {folder, arguments of Python}, with the descriptors of stdout and stderr; the exit code out. Who
closes the connection before has the fork killed. `ask SOCKET ARGUMENT...` is a `python` that has such a fork do its
work: the one that `dvc repro` finds first on PATH (tests/faults/built.py).
"""

import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

KILLED = 137
_STEP_SECONDS = 0.01
_LONGEST_LINE = 1 << 16


class Caught:
    """A block whose exception ends there, whatever it is, and is kept in `error`: it is counted, not raised."""

    error: BaseException | None = None

    def __enter__(self) -> Self:
        """Return itself: nothing is needed before."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        """Keep the exception."""
        self.error = error
        return not isinstance(error, KeyboardInterrupt)


def in_fork(action: Callable[[], object], seconds: float, folder: Path) -> tuple[int, str, str] | None:
    """Run `action` in a fork of this process, whose working directory is `folder`.

    Returns exit code, stdout and stderr; None if it had to be killed after so many seconds.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os._exit(_in_child(action, folder, out.fileno(), err.fileno()))
        code = _wait(pid, seconds)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return None if code is None else (code, texts[0], texts[1])


def _in_child(action: Callable[[], object], folder: Path, out: int, err: int) -> int:
    """Return the exit code of the action, which writes to `out` and `err`, as the interpreter would end with it."""
    caught = Caught()
    with caught:
        os.setpgid(0, 0)
        os.chdir(folder)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        action()
    code: int | str | None = 0
    if isinstance(caught.error, SystemExit):
        code = caught.error.code
    elif caught.error is not None:
        code = 1
        traceback.print_exception(caught.error)
    sys.stderr.write(f"{code}\n" if isinstance(code, str) else "")
    sys.stdout.flush()
    sys.stderr.flush()
    return 1 if isinstance(code, str) else code or 0


def _wait(pid: int, seconds: float) -> int | None:
    """Wait for a child; return its exit code, None if it was killed after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(_STEP_SECONDS)


def serve(address: str, modules: Sequence[str]) -> None:
    """Import the modules, say so in a line, and fork for every connection, until stdin ends.

    The `python` beside the socket comes first on PATH: a .pth file of the environment may have put another there.
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(address).parent), os.environ["PATH"]])
    for name in modules:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    threading.Thread(target=_end_with, args=(sys.stdin.fileno(),), daemon=True).start()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                _answer(connection)
                os._exit(0)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Run what a connection asks for, as `python <arguments>` would in its folder, and answer with the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    line, (out, err), _, _ = socket.recv_fds(connection, _LONGEST_LINE, 2)
    job = json.loads(line)
    threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
    code = _in_child(functools.partial(_run_module, *job["arguments"]), Path(job["folder"]), out, err)
    connection.sendall(f"{code}\n".encode())


def _end_with(descriptor: int) -> None:
    """End this process, and what it started, when the other end is closed: nobody waits for it any longer."""
    os.read(descriptor, 1)
    os.killpg(0, signal.SIGKILL)


def _run_module(_: str, module: str, *arguments: str) -> None:
    """Do what `python -m module arguments` does."""
    sys.argv = [module, *arguments]
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)  # Python would warn that it was imported before
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def ask(address: str, folder: str, arguments: Sequence[str], descriptors: Sequence[int], seconds: float | None) -> int:
    """Have a fork run `python <arguments>` in a folder; returns its exit code.

    Raises:
        TimeoutError: it took longer than so many seconds, and was killed.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.settimeout(seconds)
        job = json.dumps({"folder": folder, "arguments": list(arguments)})
        socket.send_fds(connection, [job.encode()], list(descriptors))
        with contextlib.suppress(ConnectionResetError):
            return int(connection.recv(_LONGEST_LINE) or KILLED)
        return KILLED


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(ask(sys.argv[2], str(Path.cwd()), sys.argv[3:], (1, 2), None))
