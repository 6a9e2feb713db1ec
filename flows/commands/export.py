"""Export any checkpoint: in nemotron-nas form, of this project or another's, or a supported parent.

Formats of the same checkpoint that the folder has stay. Add further ones with a second call.
"""

import argparse
from pathlib import Path

from flows.arguments import positive
from storage.formats import FORMATS

EXAMPLE = "puzzle export --checkpoint CHECKPOINT_FOLDER --out EXPORTS_FOLDER --formats gguf-f16 padded-llama"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="config.json and safetensors")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="new, or of an earlier export; its name is the model's",
    )
    parser.add_argument("--formats", nargs="+", default=["nemotron-nas"], choices=list(FORMATS))
    parser.add_argument("--max-shard-gib", type=positive, default=4.0, help="largest safetensors file")


def run(args: argparse.Namespace) -> None:
    """Export, as a flow run on this clone's Prefect server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings  # slow to import, as torch behind flows.exports is

    from flows.exports import export_checkpoint
    from flows.server import ensure

    url, _ = ensure()
    with temporary_settings({PREFECT_API_URL: url}):
        export_checkpoint(args.checkpoint, args.out, tuple(args.formats), args.max_shard_gib)
