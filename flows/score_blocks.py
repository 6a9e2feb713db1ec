"""Replace-1-block scores to artifacts/scores.parquet. Run: `python -m flows.score_blocks`."""

from prefect import flow

from flows.stage import main, run_pieces
from storage.params import Params
from storage.paths import Paths
from tasks import score_blocks as tasks
from tasks.machine import on_this_machine


@flow(name="score_blocks", description="Measure the quality lost when one block of the parent is replaced.")
def score_blocks(params: Params, paths: Paths) -> None:
    """Score what is missing, then write the table."""
    params = on_this_machine(params)
    while groups := tasks.plan_groups(params, paths):  # more than once where tokens adapt
        run_pieces(tasks.score_jobs, groups, params, paths, unit="group", in_order=params.cache_activations.rolling)
    tasks.write_score_table(params, paths)


if __name__ == "__main__":
    main(score_blocks)
