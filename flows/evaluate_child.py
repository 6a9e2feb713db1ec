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
    """Measure quality on the validation split batch by batch, then every exported GGUF, then write the tables."""
    params = on_this_machine(params)
    batches = tasks.plan_batches(params)
    quality = run_pieces(tasks.measure_quality, batches, target, params, paths, unit="batch")
    files = tasks.exported_files(target, params, paths)
    exports = run_pieces(tasks.measure_export, files, params, paths, unit="file", in_order=True)
    tasks.write_evaluation(target, quality, exports, params, paths)


if __name__ == "__main__":
    main(evaluate_child)
