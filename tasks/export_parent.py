"""export_parent: the parent, to be exported for stock runtimes, where children are compared with it."""

from storage.params import Params
from storage.parent_info import REBUILD
from storage.paths import Paths
from tasks.checkpoints.exports import CheckpointToExport, check, read_checkpoint


def read_parent(params: Params, paths: Paths) -> CheckpointToExport:
    """Read the parent, and check that its children can be exported.

    A tokenizer, rotary positions or an activation that a format of `export_child.formats` cannot have are the parent's
    as well, so they are reported here, before any training.

    Raises:
        InputError: the checkpoint is refused, as by :func:`tasks.checkpoints.exports.read_checkpoint`, or a format
            cannot have what both share.
    """
    parent = read_checkpoint("parent", paths.parent, REBUILD)
    check(parent, params.export_child.formats, "export_child.formats")
    return parent
