"""Stages of a clone in forks of one process that has imported them: a second each, not five.

Run by tests/faults/built.py as a script, with the clone's code first on PYTHONPATH: a line of JSON in for each stage
to run, {folder, stage, target, seconds}, and one out, how it ended: [code, stdout, stderr], null if it was killed.
"""

import functools
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Self

_STEP_SECONDS = 0.01


class Caught:
    """A block whose exception ends there, whatever it is, and is kept in `error`: it is counted, not raised."""

    error: BaseException | None = None

    def __enter__(self) -> Self:
        """Nothing is needed before."""
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
    """The exit code of the action, which writes to `out` and `err`, as the interpreter would end with it."""
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
    """The exit code of a child, None if it was killed after so many seconds."""
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


def main() -> None:
    """Import the stages that the arguments name, then run what stdin asks for."""
    from flows.errors import run_cleanly  # the clone's, not this checkout's
    from flows.stage import run_stage

    flows = {name: getattr(importlib.import_module(f"flows.{name}"), name) for name in sys.argv[1:]}
    for line in sys.stdin:
        job = json.loads(line)
        stage = functools.partial(run_stage, flows[job["stage"]], job["target"])
        action = functools.partial(run_cleanly, stage)
        sys.stdout.write(json.dumps(in_fork(action, job["seconds"], Path(job["folder"]))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
