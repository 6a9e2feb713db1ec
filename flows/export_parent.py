"""Export the parent for stock runtimes, to compare children with. Run: `puzzle stage export_parent`."""

from prefect import flow

from flows.exports import export_all
from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import export_parent as tasks


@flow(name="export_parent", description="The parent in the formats that stock runtimes load.")
def export_parent(params: Params, paths: Paths) -> None:
    """Write every format that params name, tensor by tensor."""
    formats, shard = params.export_parent.formats, params.export_child.max_shard_gib
    export_all(tasks.read_parent(params, paths), formats, paths.parent_exports, shard, "export_parent.formats")


if __name__ == "__main__":
    main(export_parent)
