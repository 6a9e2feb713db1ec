"""Export the parent for stock runtimes, to compare children with. Run: `python -m flows.export_parent`."""

from prefect import flow

from flows.exports import export_all
from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import export_parent as tasks


@flow(name="export_parent", description="The parent in the forms that stock runtimes load.")
def export_parent(params: Params, paths: Paths) -> None:
    """Every format of params, tensor by tensor."""
    formats, shard = params.export_parent.formats, params.export_child.max_shard_gib
    export_all(tasks.source(params, paths), formats, paths.parent_exports, shard, "export_parent.formats")


if __name__ == "__main__":
    main(export_parent)
