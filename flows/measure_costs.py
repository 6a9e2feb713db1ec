"""Costs of every variant to artifacts/costs.parquet. Run: `python -m flows.measure_costs`.

`python -m flows.measure_costs --time NAME` times this machine and writes storage/timings/NAME.parquet, input data for
git, in torch or with `--engine llama.cpp`, whose rows stand beside each other.
"""

import argparse
import sys

from prefect import flow

from flows.stage import main, run_cleanly
from storage.params import Params, load
from storage.paths import TIMINGS, Paths
from tasks import measure_costs as tasks
from tasks.machine import on_this_machine


@flow(
    name="measure_costs",
    description="Parameters, bytes and milliseconds of every variant: timed tables and a modelled GPU.",
)
def measure_costs(params: Params, paths: Paths) -> None:
    """Join the timings that params name with the modelled hardware."""
    tasks.write_cost_table(params, paths)


def time_machine(name: str, engine: str) -> None:
    """Time this machine in an engine."""
    from tasks import time_machine as timing  # here: it imports transformers' model classes, which the stage needs not

    table = TIMINGS / f"{name}.parquet"
    take = timing.time_llamacpp if engine == "llama.cpp" else timing.time_torch
    take(on_this_machine(load()), Paths(), name, table)
    sys.stdout.write(f"wrote {table}\n")


if __name__ == "__main__":
    if "--time" in sys.argv:
        parser = argparse.ArgumentParser(prog="python -m flows.measure_costs", description=__doc__)
        parser.add_argument("--time", required=True, metavar="NAME", help="name of the hardware")
        parser.add_argument("--engine", default="torch", choices=("torch", "llama.cpp"), help="what is timed")
        arguments = parser.parse_args()
        run_cleanly(lambda: time_machine(arguments.time, arguments.engine))
    else:
        main(measure_costs)
