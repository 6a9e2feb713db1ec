"""Export the child of a target for stock runtimes. Run: `puzzle stage export_child --target like-51b`."""

from prefect import flow

from flows.exports import export_all
from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import export_child as tasks


@flow(name="export_child", description="The distilled child in the formats that stock runtimes load.")
def export_child(params: Params, paths: Paths, target: str) -> None:
    """Write every format that params name, tensor by tensor."""
    settings = params.export_child
    child = tasks.read_child(target, paths)
    export_all(child, settings.formats, paths.exports(target), settings.max_shard_gib, "export_child.formats")


if __name__ == "__main__":
    main(export_child)
