"""Train every variant of every block (BLD) into artifacts/library/. Run: `puzzle stage distill_blocks`."""

from prefect import flow

from flows.stage import main, run_pieces
from storage.params import Params
from storage.paths import Paths
from tasks import distill_blocks as tasks
from tasks.engines.machine import on_this_machine


@flow(name="distill_blocks", description="Train every variant of every block on the parent's cached activations (BLD).")
def distill_blocks(params: Params, paths: Paths) -> None:
    """Train the variants that are missing, then index the library."""
    params = on_this_machine(params)
    blocks = tasks.plan_blocks(params, paths)
    in_order = params.cache_activations.rolling
    run_pieces(tasks.train_block, blocks, params, paths, unit="block", in_order=in_order)
    tasks.write_library_index(paths)


if __name__ == "__main__":
    main(distill_blocks)
