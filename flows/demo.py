"""Reproduce everything in params.yaml with `dvc repro`, then print the closing table: `make demo`."""

import subprocess
import sys
from collections.abc import Sequence

from flows.closing_table import closing_table
from flows.errors import run_cleanly
from flows.server import ensure, stop
from storage.params import load
from storage.paths import Paths


def demo(command: Sequence[str] = ("repro",)) -> None:
    """Start the server unless it runs, let DVC make every stage, print the table, stop what was started."""
    load()
    url, started = ensure()
    sys.stdout.write(f"Prefect UI while this runs: {url.removesuffix('/api')}\n")
    sys.stdout.flush()
    try:
        code = subprocess.run([sys.executable, "-m", "dvc", *command], check=False).returncode
        if code:
            sys.exit(code)
        paths = Paths()
        table = closing_table(paths, list(load().targets))
        sys.stdout.write(f"\n{table}\nreport: {paths.report / 'index.html'}\n")
    finally:
        if started:
            stop()


if __name__ == "__main__":
    run_cleanly(demo)
