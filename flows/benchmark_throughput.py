"""Measure and model the speed of one target's child. Run: `python -m flows.benchmark_throughput --target like-51b`."""

import sys

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import benchmark_throughput as tasks
from tasks.machine import on_this_machine


@flow(
    name="benchmark_throughput",
    description="Tokens per second of parent and child: measured beside predicted, and modelled for a GPU.",
)
def benchmark_throughput(params: Params, paths: Paths, target: str) -> None:
    """The model first, since it takes a second and finds wrong settings; then this machine; then both as text."""
    params = on_this_machine(params)
    rows = tasks.model_throughput(target, params, paths)
    rows += tasks.measure_throughput(target, params, paths)
    tasks.write_rows(target, rows, paths)
    sys.stdout.write(tasks.throughput_text(target, params, paths))


if __name__ == "__main__":
    main(benchmark_throughput, per_target=True)
