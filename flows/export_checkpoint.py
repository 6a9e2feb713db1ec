"""Export any checkpoint: `python -m flows.export_checkpoint --checkpoint FOLDER --out FOLDER --formats gguf-f16 ...`.

The checkpoint is in nemotron-nas form (of this project or another's) or a Llama, Mistral or Qwen2.
"""

import argparse
from pathlib import Path
from typing import get_args

from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.exports import export_all
from flows.server import ensure
from flows.stage import run_cleanly, workers
from storage.records import ExportFormat
from tasks.exports import exported, read_source


@flow(
    name="export_checkpoint",
    description="A checkpoint in the forms that stock runtimes load.",
    task_runner=workers(1),
)
def export_checkpoint(checkpoint: Path, out: Path, formats: tuple[ExportFormat, ...], max_shard_gib: float) -> None:
    """Every format, tensor by tensor, beside those that are there already."""
    source = read_source(out.resolve().name, checkpoint, "the export or download of this checkpoint again")
    there = exported(out, source)
    export_all(source, tuple(dict.fromkeys([*formats, *there])), out, max_shard_gib, "--formats")


def _gib(value: str) -> float:
    found = float(value)
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r}: expected a number above 0")
    return found


def main() -> None:
    """Read the arguments, export."""
    parser = argparse.ArgumentParser(prog="python -m flows.export_checkpoint", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="config.json and safetensors")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="new, or of an earlier export; its name is the model's",
    )
    parser.add_argument("--formats", nargs="+", default=["nemotron-nas"], choices=get_args(ExportFormat))
    parser.add_argument("--max-shard-gib", type=_gib, default=4.0, help="largest safetensors file")
    args = parser.parse_args()
    url, _ = ensure()
    with temporary_settings({PREFECT_API_URL: url}):
        export_checkpoint(args.checkpoint, args.out, tuple(args.formats), args.max_shard_gib)


if __name__ == "__main__":
    run_cleanly(main)
