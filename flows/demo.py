"""Reproduce everything in params.yaml with `dvc repro`, then print the closing table: `make demo`."""

import subprocess
import sys

from flows.closing_table import closing_table
from flows.errors import run_cleanly
from flows.server import ensure, stop
from storage.params import load
from storage.paths import Paths


def demo() -> None:
    """Start the server unless it runs, reproduce every stage, print the table, stop what was started."""
    params = load()
    url, started = ensure()
    sys.stdout.write(f"Prefect UI while this runs: {url.removesuffix('/api')}\n")
    sys.stdout.flush()
    try:
        code = subprocess.run([sys.executable, "-m", "dvc", "repro"], check=False).returncode
        if code:
            sys.exit(code)
        paths = Paths()
        table = closing_table(paths, list(params.targets))
        sys.stdout.write(f"\n{table}\nreport: {paths.report / 'index.html'}\n")
    finally:
        if started:
            stop()


if __name__ == "__main__":
    run_cleanly(demo)
