"""export_child: the distilled child of a target, to be exported for stock runtimes (tasks/checkpoints/exports.py)."""

from dataclasses import replace

from storage.parent import Parent
from storage.paths import Paths
from tasks.checkpoints.exports import CheckpointToExport, read_checkpoint


def read_child(target: str, paths: Paths) -> CheckpointToExport:
    """Read the child, with its parent's architecture, which the format `plain` has.

    Raises:
        InputError: the checkpoint is refused, as by :func:`tasks.checkpoints.exports.read_checkpoint`.
    """
    child = read_checkpoint(target, paths.distilled(target), f"dvc repro distill_child@{target}")
    return replace(child, config=replace(child.config, architecture=Parent(paths.parent).config.architecture))
