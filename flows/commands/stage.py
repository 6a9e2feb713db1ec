"""Run a stage of the pipeline on what its inputs hold now, as `dvc repro` does for a stage that is stale."""

import argparse
import importlib

from storage.params import Params

EXAMPLE = "puzzle stage search_architecture --target like-51b"
_STAGES = [name for name in Params.model_fields if name not in ("run", "execution", "targets")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", choices=_STAGES, help=f"a stage: {', '.join(_STAGES)}")
    parser.add_argument("--target", help="key of the target in params.yaml; of stages that run per target alone")


def run(args: argparse.Namespace) -> None:
    """Run the stage's flow."""
    from flows.stage import run_stage  # imports Prefect

    run_stage(getattr(importlib.import_module(f"flows.{args.name}"), args.name), args.target)
