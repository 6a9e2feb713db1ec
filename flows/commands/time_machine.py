"""Time this machine, for limits on measured speed: storage/timings/NAME.parquet, input data for git.

Engines write to the same table. The parent must be prepared (`dvc repro prepare_parent`).
"""

import argparse
import sys

from storage.params import load
from storage.paths import TIMINGS, Paths

EXAMPLE = "puzzle time-machine my-machine --engine llama.cpp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="name of the hardware, by which targets know it")
    parser.add_argument("--engine", default="torch", choices=("torch", "llama.cpp"), help="what is timed")


def run(args: argparse.Namespace) -> None:
    """Time the engine, add its rows to the table."""
    from tasks.commands.time_machine import time_llamacpp, time_torch  # imports torch
    from tasks.engines.machine import on_this_machine

    table = TIMINGS / f"{args.name}.parquet"
    time_engine = time_llamacpp if args.engine == "llama.cpp" else time_torch
    time_engine(on_this_machine(load()), Paths(), args.name, table)
    sys.stdout.write(f"wrote {table}\n")
