"""Which runtime computes a checkpoint right, in which form: `python -m flows.check_runtimes --config CONFIG_JSON`."""

import argparse
import json
import sys
from pathlib import Path

from flows.stage import run_cleanly
from tasks.check_runtimes import check_runtimes, checked_text


def main() -> None:
    """Read the arguments, check, print."""
    parser = argparse.ArgumentParser(prog="python -m flows.check_runtimes", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="CONFIG_JSON", help="Llama-like or nemotron-nas")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    found = check_runtimes(args.config / "config.json" if args.config.is_dir() else args.config)
    sys.stdout.write(json.dumps(found) + "\n" if args.json else checked_text(found))


if __name__ == "__main__":
    run_cleanly(main)
