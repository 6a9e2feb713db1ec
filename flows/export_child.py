"""Export the child of one target for stock runtimes. Run: `python -m flows.export_child --target like-51b`."""

from prefect import flow

from flows.exports import export_all
from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import export_child as tasks


@flow(name="export_child", description="The distilled child in the forms that stock runtimes load.")
def export_child(params: Params, paths: Paths, target: str) -> None:
    """Every format of params, tensor by tensor."""
    settings = params.export_child
    source = tasks.source(target, paths)
    export_all(source, settings.formats, paths.exports(target), settings.max_shard_gib, "export_child.formats")


if __name__ == "__main__":
    main(export_child, per_target=True)
