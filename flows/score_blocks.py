"""Measure replace-1-block scores into artifacts/scores.parquet. Run: `puzzle stage score_blocks`."""

from prefect import flow

from flows.stage import main, run_pieces
from storage.params import Params
from storage.paths import Paths
from tasks import score_blocks as tasks
from tasks.engines.machine import on_this_machine


@flow(name="score_blocks", description="Measure the quality lost when one block of the parent is replaced.")
def score_blocks(params: Params, paths: Paths) -> None:
    """Score what is missing, remove whole blocks one after the other, then write the table."""
    params = on_this_machine(params)
    groups, in_order = tasks.plan_groups(params, paths), params.cache_activations.rolling
    run_pieces(tasks.score_jobs, groups, params, paths, unit="group", in_order=in_order)
    removals = tasks.scores_of_removals(params, paths)
    while batches := tasks.plan_removals(removals, params, paths):
        run_pieces(tasks.score_removal, batches, params, paths, unit="batch without blocks")
    tasks.write_score_table(removals, params, paths)


if __name__ == "__main__":
    main(score_blocks)
