"""export_child: the distilled child of a target in the forms that stock runtimes load (tasks/exports.py)."""

from dataclasses import replace

from storage.parent import Parent
from storage.paths import Paths
from tasks.exports import Source, read_source


def source(target: str, paths: Paths) -> Source:
    """The child; it says its parent's architecture, for the plain form.

    Raises:
        InputError: as :func:`tasks.exports.read_source`.
    """
    found = read_source(target, paths.distilled(target), f"dvc repro distill_child@{target}")
    return replace(found, config=replace(found.config, architecture=Parent(paths.parent).config.architecture))
