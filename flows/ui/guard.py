"""Runs a command and ends it when the parent process ends, even by SIGKILL: `python -m flows.ui.guard COMMAND...`.

It holds a pipe as its stdin; when that closes, the process group (this, the command, what that started) is interrupted
as Ctrl-C does (DVC then removes its temporary folder), then terminated, then killed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

_ENDING = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0))
"""Signals to the process group, and seconds to wait for its end after each."""


def main() -> None:
    """Run the command of the arguments as the leader of its process group; the exit code is the command's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would DVC
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    for ending_signal, _ in _ENDING:
        signal.signal(ending_signal, signal.SIG_IGN)
    is_ending = threading.Event()
    ending = threading.Thread(target=_end_with_stdin, args=(command, is_ending), daemon=True)
    ending.start()
    code = command.wait()
    if is_ending.is_set():
        ending.join()
    sys.exit(code)


def _end_with_stdin(command: "subprocess.Popen[bytes]", is_ending: threading.Event) -> None:
    os.read(sys.stdin.fileno(), 1)  # not through its buffer, whose lock would abort the interpreter in the end
    is_ending.set()
    for ending_signal, seconds in _ENDING:
        os.killpg(os.getpgrp(), ending_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(seconds)
            break
    os.killpg(os.getpgrp(), signal.SIGKILL)  # a stage that did not end, and this process


if __name__ == "__main__":
    main()
