"""Measure the accuracy of parent and child of a target. Run: `puzzle stage measure_accuracy --target like-51b`."""

import sys

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import measure_accuracy as tasks
from tasks.engines.machine import on_this_machine


@flow(
    name="measure_accuracy",
    description="Accuracy of parent and children on the benchmarks that params name, paired by question.",
)
def measure_accuracy(params: Params, paths: Paths, target: str) -> None:
    """Check every benchmark, measure them, write accuracy.json, print it as a table.

    One benchmark runs after the other, not on the workers: two threads that load a model at once left weights of it
    unloaded (transformers 5.23 builds models under settings of the whole process).
    """
    params = on_this_machine(params)
    measured = [tasks.measure(planned, target, params, paths) for planned in tasks.plan_benchmarks(params, paths)]
    settings = params.measure_accuracy.position_loss
    positions = tasks.measure_positions(settings, target, params, paths) if settings else ()
    sys.stdout.write(tasks.write_measured(target, measured, positions, params, paths))


if __name__ == "__main__":
    main(measure_accuracy)
