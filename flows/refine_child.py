"""Correct the assembled child of a target in closed form. Run: `puzzle stage refine_child --target like-51b`."""

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import refine_child as tasks
from tasks.engines.machine import on_this_machine


@flow(name="refine_child", description="Refit the child's output layers on its own hidden states, block by block.")
def refine_child(params: Params, paths: Paths, target: str) -> None:
    """Correct the blocks that are still to correct, then write the child."""
    tasks.refine(target, on_this_machine(params), paths)


if __name__ == "__main__":
    main(refine_child)
