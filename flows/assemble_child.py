"""Write the chosen child of a target as a checkpoint. Run: `puzzle stage assemble_child --target like-51b`."""

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import assemble_child as tasks


@flow(name="assemble_child", description="Put the chosen variants together to a checkpoint that stock runtimes know.")
def assemble_child(params: Params, paths: Paths, target: str) -> None:
    """Copy the chosen variants to the checkpoint, block by block."""
    tasks.assemble(target, params, paths)


if __name__ == "__main__":
    main(assemble_child)
