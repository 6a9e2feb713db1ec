"""What export_child, export_parent and export_checkpoint share: check, write what is not there yet, say what is."""

import sys
from collections.abc import Sequence
from pathlib import Path

from flows.stage import run_pieces
from storage.records import ExportFormat
from tasks import exports as tasks
from tasks.exports import Source


def export_all(
    source: Source, formats: Sequence[ExportFormat], folder: Path, max_shard_gib: float, asked_by: str
) -> None:
    """Write a checkpoint in every format to `folder`, and exports.json.

    Args:
        source: the checkpoint.
        formats: of the exports.
        folder: of the exports; what is in it and was not asked for goes.
        max_shard_gib: largest safetensors file.
        asked_by: the setting that names the formats, for errors.
    """
    tasks.check(source, formats, asked_by)
    left = tasks.begin(source, formats, folder, max_shard_gib)
    run_pieces(tasks.export, left, source, folder, max_shard_gib, unit="format")
    sys.stdout.write(tasks.overview_text(tasks.write_overview(source, formats, folder), folder))
