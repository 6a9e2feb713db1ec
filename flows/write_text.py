"""Let the parent write text for the corpus into artifacts/written/. Run: `puzzle stage write_text`."""

from prefect import flow

from flows.stage import main, run_pieces
from storage.params import Params
from storage.paths import Paths
from tasks import write_text as tasks
from tasks.engines.machine import on_this_machine


@flow(name="write_text", description="Let the parent write texts and chats, from which the corpus is made.")
def write_text(params: Params, paths: Paths) -> None:
    """Write the batches that are missing."""
    params = on_this_machine(params)
    batches = tasks.plan_batches(params, paths)
    if batches:
        writer = tasks.load_writer(params, paths)
        run_pieces(tasks.write_batch, batches, writer, params, paths, unit="batch", in_memory=True)


if __name__ == "__main__":
    main(write_text)
