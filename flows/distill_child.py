"""Distil the assembled child of a target (GKD). Run: `puzzle stage distill_child --target like-51b`."""

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import distill_child as tasks
from tasks.engines.machine import on_this_machine


@flow(name="distill_child", description="Train the whole child on the parent's cached hidden states and logits (GKD).")
def distill_child(params: Params, paths: Paths, target: str) -> None:
    """Train on from the last checkpoint, then write the best weights."""
    tasks.distill(target, on_this_machine(params), paths)


if __name__ == "__main__":
    main(distill_child)
