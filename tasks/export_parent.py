"""export_parent: the parent in the forms that stock runtimes load, to compare children with (tasks/exports.py)."""

from storage.params import Params
from storage.parent import REBUILD
from storage.paths import Paths
from tasks.exports import Source, check, read_source


def source(params: Params, paths: Paths) -> Source:
    """The parent.

    Raises:
        InputError: as :func:`tasks.exports.read_source`; or its child could not be exported in a form that params ask
            for, since of what both share (tokenizer, positions, activation), which is better known now than at the end.
    """
    found = read_source("parent", paths.parent, REBUILD)
    check(found, params.export_child.formats, "export_child.formats")
    return found
