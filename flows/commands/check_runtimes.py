"""Say which runtime computes a checkpoint right and in which form, from its config.json alone (docs/runtimes.md)."""

import argparse
import json
import sys
from pathlib import Path

from tasks.checkpoints.check_runtimes import check_runtimes, checked_text

EXAMPLE = "puzzle check-runtimes --config params/llama-3.1-70b.config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="CONFIG_JSON",
        help="Llama-like or nemotron-nas; the file or its folder",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> None:
    """Check, print."""
    checked = check_runtimes(args.config / "config.json" if args.config.is_dir() else args.config)
    sys.stdout.write(json.dumps(checked.to_json()) + "\n" if args.json else checked_text(checked))
