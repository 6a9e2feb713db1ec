"""`make demo`: everything in params.yaml through `dvc repro`, then the closing table. Run: `python -m flows.demo`."""

import os
import subprocess
import sys
from pathlib import Path

from flows.closing_table import closing_table
from flows.server import ensure, stop
from flows.stage import run_cleanly
from storage.params import load
from storage.paths import Paths


def demo() -> None:
    """Start the server unless it runs, reproduce every stage, print the table, stop what was started."""
    params = load()
    url, started = ensure()
    sys.stdout.write(f"Prefect UI while this runs: {url.removesuffix('/api')}\n")
    sys.stdout.flush()
    try:
        # stages call `python`: the one that runs this, also where the virtual environment is not activated
        environment = {**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
        code = subprocess.run([sys.executable, "-m", "dvc", "repro"], env=environment, check=False).returncode
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
