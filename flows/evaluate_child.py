"""Measure the child of one target. Run: `python -m flows.evaluate_child --target like-51b`."""

from prefect import flow

from flows.stage import main, run_pieces
from storage.params import Params
from storage.paths import Paths
from tasks import evaluate_child as tasks
from tasks.machine import on_this_machine


@flow(
    name="evaluate_child", description="Measure quality and speed of parent and child, beside what the tables predict."
)
def evaluate_child(params: Params, paths: Paths, target: str) -> None:
    """Quality on the validation split, then decode speed at the target's scenario."""
    params = on_this_machine(params)
    batches = tasks.plan_batches(params)
    quality = run_pieces(tasks.measure_quality, batches, target, params, paths, unit="batch")
    speed = tasks.measure_speed(target, params, paths)
    tasks.write_evaluation(target, quality, speed, params, paths)


if __name__ == "__main__":
    main(evaluate_child, per_target=True)
