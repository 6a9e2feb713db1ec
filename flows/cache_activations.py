"""Cache the parent's hidden states in artifacts/activations/. Run: `puzzle stage cache_activations`."""

from prefect import flow

from flows.stage import main, run_pieces
from storage.params import Params
from storage.paths import Paths
from tasks import cache_activations as tasks
from tasks.engines.machine import on_this_machine


@flow(name="cache_activations", description="Cache the parent's hidden states at every block boundary, shard by shard.")
def cache_activations(params: Params, paths: Paths) -> None:
    """Compute the shards that are missing."""
    params = on_this_machine(params)
    groups = tasks.grouped(tasks.plan_shards(params, paths), params, paths)
    run_pieces(tasks.cache_shards, groups, params, paths, unit="group of shards")


if __name__ == "__main__":
    main(cache_activations)
