"""Modelled tokens/s of any checkpoint on a GPU: `python -m flows.estimate_throughput --config CONFIG_JSON`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from flows.stage import run_cleanly
from storage.fields import Scenario
from storage.records import Precision
from tasks.estimate_throughput import Asked, estimate_throughput


def as_text(found: dict[str, Any]) -> str:
    """The numbers, and where the time goes; at most 100 columns."""
    lines = [
        f"{found['tokens_per_s_per_gpu']:,.0f} generated tokens/s per GPU, MODELLED ({found['engine']})",
        f"  {found['hardware']} x {found['tensor_parallel']}, {found['precision']}, {found['scenario']}, "
        f"batch {found['batch']}",
        f"  prefill {found['prefill_ms']:,.1f} ms, then {found['step_ms']:,.2f} ms a step, of the whole batch",
        f"  per GPU {found['weights_gib']:.1f} GiB of weights, {found['kv_gib']:.1f} GiB of KV cache",
        f"  {'component':<12} {'prefill ms':>12} {'step ms':>10}",
    ]
    for component, times in found["breakdown"].items():
        lines.append(f"  {component:<12} {times['prefill_ms']:>12,.1f} {times['step_ms']:>10.3f}")
    return "\n".join([*lines, f"  constants fitted {found['fitted']}", ""])


def _scenario(value: str) -> str:
    try:
        found: str = TypeAdapter(Scenario).validate_python(value)
    except ValidationError:
        text = f"{value!r} is no scenario; expected INPUT/OUTPUT tokens, such as 128/1024"
        raise argparse.ArgumentTypeError(text) from None
    return found


def _count(value: str) -> int | None:
    if value == "best":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of at least 1, and not `best`")
    return int(value)


def main() -> None:
    """Read the arguments, estimate, print."""
    parser = argparse.ArgumentParser(prog="python -m flows.estimate_throughput", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="CONFIG_JSON", help="Llama-like or nemotron-nas")
    parser.add_argument("--hardware", default="h100-sxm", help="a data sheet's name")
    parser.add_argument("--precision", default="fp8", choices=get_args(Precision), help="of weights and KV cache")
    parser.add_argument("--scenario", default="128/1024", type=_scenario, help="input/output tokens")
    parser.add_argument("--tensor-parallel", default="best", type=_count, help="devices that share a matrix, or best")
    parser.add_argument("--batch", default="best", type=_count, help="sequences at once, or best")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    asked = Asked(args.hardware, args.precision, args.scenario, args.tensor_parallel, args.batch)
    found = estimate_throughput(args.config, asked)
    sys.stdout.write(json.dumps(found) + "\n" if args.json else as_text(found))


if __name__ == "__main__":
    run_cleanly(main)
