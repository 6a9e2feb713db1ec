"""The end of a command whose input is wrong: one message on stderr and an exit code, no traceback.

The codes: 2 a wrong input, 3 no child within the limits, 4 a damaged file, 5 a full disk.
"""

import logging
import sys
from collections.abc import Callable

from storage.files import InputError, explained


def run_cleanly(action: Callable[[], object]) -> None:
    """Run `action`; a wrong input, a full disk or a file that may not be written is one message and an exit code."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: not record.name.startswith("prefect"))  # the UI has its logs
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[handler])
    try:
        action()
    except (InputError, OSError) as error:
        readable = error if isinstance(error, InputError) else explained(error)
        if readable is None:
            raise
        sys.stderr.write(f"error: {readable}\n")
        sys.exit(readable.exit_code)
