"""Exports of a checkpoint: what export_child, export_parent and `puzzle export` share."""

import sys
from collections.abc import Sequence
from pathlib import Path

from prefect import flow

from flows.stage import run_pieces, threads
from storage.formats import FormatName
from tasks.checkpoints import exports as tasks
from tasks.checkpoints.exports import CheckpointToExport


def export_all(
    source: CheckpointToExport, formats: Sequence[FormatName], folder: Path, max_shard_gib: float, asked_by: str
) -> None:
    """Write a checkpoint in every format to `folder`, then exports.json; formats that are there already stay.

    Args:
        source: the checkpoint.
        formats: formats to write.
        folder: folder of the exports; formats in it that are not in `formats` go.
        max_shard_gib: largest safetensors file.
        asked_by: the setting that names the formats, for errors.
    """
    tasks.check(source, formats, asked_by)
    left = tasks.begin(source, formats, folder, max_shard_gib)
    run_pieces(tasks.export, left, source, folder, max_shard_gib, unit="format")
    sys.stdout.write(tasks.overview_text(tasks.write_overview(source, formats, folder), folder))


@flow(
    name="export_checkpoint",
    description="A checkpoint in the formats that stock runtimes load.",
    task_runner=threads(1),
)
def export_checkpoint(checkpoint: Path, out: Path, formats: tuple[FormatName, ...], max_shard_gib: float) -> None:
    """Write every format tensor by tensor, beside the formats that `out` has already."""
    again = "the export or download of this checkpoint again"
    source = tasks.read_checkpoint(out.resolve().name, checkpoint, again, is_foreign=True)
    present = tasks.exported(out, source)
    export_all(source, tuple(dict.fromkeys([*formats, *present])), out, max_shard_gib, "--formats")
