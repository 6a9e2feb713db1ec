"""The end of a command whose input is wrong: one message on stderr and an exit code, no traceback.

The codes: 2 a wrong input, 3 no child within the limits, 4 a damaged file, 5 a full disk; 141 nobody reads the output.
"""

import logging
import os
import select
import signal
import sys
from collections.abc import Callable

from storage.files import InputError, explained
from storage.sources import PACKAGES

_LONGEST = 2_000
_UNREAD = 128 + signal.SIGPIPE


def run_cleanly(action: Callable[[], object]) -> None:
    """Run `action`; a wrong input, a full disk or a path that cannot be used is one message and an exit code."""
    _show_warnings()
    try:
        action()
        sys.stdout.flush()
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            sys.exit(_UNREAD)
        readable = error if isinstance(error, InputError) else explained(error)
        if readable is None and isinstance(error, OSError) and error.filename:
            readable = InputError(f"{error.filename}: {error.strerror}; look at this path, and run it again")
        if readable is None:
            raise
        sys.stderr.write(f"error: {printable(str(readable))}\n")
        sys.exit(readable.exit_code)


def _show_warnings() -> None:
    """Have stderr show our packages' warnings; Prefect, which has the root's handlers to itself, shows none there."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.WARNING)
        logger.handlers = [handler]


def _is_unread() -> bool:
    """Tell whether whoever read what this process prints has gone, as `head` does; from then on it prints nothing."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors and hang-ups come unasked
    is_unread = bool(poll.poll(0))
    if is_unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_unread


def printable(message: str) -> str:
    """Return a message without what files of others bring into it: marks that a terminal obeys, lines without end."""
    shown = "".join(mark if mark.isprintable() or mark == "\n" else repr(mark)[1:-1] for mark in message)
    lines = shown.split("\n")
    return "\n".join(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…" for line in lines)
