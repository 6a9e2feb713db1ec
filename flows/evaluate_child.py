"""Measure the quality of a target's child, of its baselines and of its exports.

Run: `puzzle stage evaluate_child --target like-51b`.
"""

from prefect import flow

from flows.stage import main, run_pieces
from storage.params import Params
from storage.paths import Paths
from tasks import evaluate_child as tasks
from tasks.engines.machine import on_this_machine


@flow(
    name="evaluate_child",
    description="Quality of children and baselines, measured; each limit predicted and measured.",
)
def evaluate_child(params: Params, paths: Paths, target: str) -> None:
    """Measure quality on held-out text batch by batch, then that of every exported GGUF, then write the tables."""
    params = on_this_machine(params)
    files = tasks.exported_files(target, params, paths)
    batches = tasks.plan_batches(params, paths)
    quality = run_pieces(tasks.measure_quality, batches, target, params, paths, unit="batch")
    parts = tasks.plan_exports(files, params)
    exported = run_pieces(tasks.measure_exports, parts, files, target, params, paths, unit="batch")
    tasks.write_evaluation(target, quality, exported, params, paths)


if __name__ == "__main__":
    main(evaluate_child)
