"""Measure and model the speed of a target's child and of its parent.

Run: `puzzle stage benchmark_throughput --target like-51b`.
"""

import sys

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import benchmark_throughput as tasks
from tasks.engines.machine import on_this_machine


@flow(
    name="benchmark_throughput",
    description="Tokens per second of parent and child: measured beside predicted, and modelled for a GPU.",
)
def benchmark_throughput(params: Params, paths: Paths, target: str) -> None:
    """Model GPUs first, which takes a second and finds wrong settings, then time this machine, then print both."""
    params = on_this_machine(params)
    rows = tasks.model_throughput(target, params, paths)
    rows += tasks.measure_throughput(target, params, paths)
    tasks.write_rows(target, rows, paths)
    sys.stdout.write(tasks.throughput_text(target, params, paths))


if __name__ == "__main__":
    main(benchmark_throughput)
