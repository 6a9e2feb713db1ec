"""Costs of every variant to artifacts/costs.parquet. Run: `python -m flows.measure_costs`.

`python -m flows.measure_costs --time NAME` times this machine and writes storage/timings/NAME.parquet, input data for
git, in torch or with `--engine llama.cpp`, whose rows stand beside each other; with `--scratch` only the parent is
timed, to artifacts/timings/, and compared with the table of that name.
"""

import argparse
import sys
from pathlib import Path

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


def time_machine(name: str, engine: str, scratch: bool) -> None:
    """Time this machine in an engine; with `scratch` say how far it is from the table of that name."""
    from tasks import (
        time_machine as timing,
    )  # here: it imports transformers' model classes, which the stage does not need

    params, paths, kept = load(), Paths(), TIMINGS / f"{name}.parquet"
    if engine == "llama.cpp":
        timing.time_llamacpp(params, paths, name, kept)
        sys.stdout.write(f"wrote {kept}\n")
        return
    computes, timed = on_this_machine(params).run.dtype, params.measure_costs.precision
    if scratch and computes != timed:
        sys.stdout.write(f"this machine computes in {computes}, {kept} holds {timed}: its drift is not measured\n")
        return
    if scratch and not timing.comparable(kept, params):
        sys.stdout.write(f"{kept} has no torch timings in {timed}: the drift of this machine is not measured\n")
        return
    written: Path = paths.root / "timings" / kept.name if scratch else kept
    timing.time_this_machine(params, paths, name, written, parent_only=scratch)
    sys.stdout.write(timing.drift(written, kept, params) if scratch else f"wrote {written}\n")


if __name__ == "__main__":
    if "--time" in sys.argv:
        parser = argparse.ArgumentParser(prog="python -m flows.measure_costs", description=__doc__)
        parser.add_argument("--time", required=True, metavar="NAME", help="name of the hardware")
        parser.add_argument("--engine", default="torch", choices=("torch", "llama.cpp"), help="what is timed")
        parser.add_argument("--scratch", action="store_true", help="write to artifacts/timings/ and compare")
        arguments = parser.parse_args()
        if arguments.scratch and arguments.engine != "torch":
            parser.error("--scratch compares timings of torch only")
        run_cleanly(lambda: time_machine(arguments.time, arguments.engine, arguments.scratch))
    else:
        main(measure_costs)
