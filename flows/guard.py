"""A command that ends with whoever started it, even if that was killed: `python -m flows.guard COMMAND...`.

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


def main() -> None:
    """Run the command of the arguments as the leader of its process group; the exit code is the command's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would DVC
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    for ours in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ours, signal.SIG_IGN)
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
    for sent, seconds in _ENDING:
        os.killpg(os.getpgrp(), sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(seconds)
            break
    os.killpg(os.getpgrp(), signal.SIGKILL)  # a stage that did not end, and this process


if __name__ == "__main__":
    main()
