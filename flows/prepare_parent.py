"""Bring the parent to artifacts/parent/. Run: `puzzle stage prepare_parent`."""

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import prepare_parent as tasks


@flow(name="prepare_parent", description="Bring the parent to artifacts/parent/, every tensor with a checksum.")
def prepare_parent(params: Params, paths: Paths) -> None:
    """Fetch, check and copy the parent."""
    tasks.prepare_parent(params, paths)


if __name__ == "__main__":
    main(prepare_parent)
