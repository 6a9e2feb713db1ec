"""Model the tokens/s of any checkpoint on a GPU, from its config.json alone (docs/costs.md)."""

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from flows.arguments import count_or_best, scenario
from storage.records import Precision
from storage.sections import ModelledEngine
from tasks.commands.estimate import EstimateSetting, ThroughputEstimate, estimate_throughput

EXAMPLE = "puzzle estimate --config params/llama-3.1-70b.config.json --hardware h100-sxm --scenario 128/1024"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--config", type=Path, required=True, metavar="CONFIG_JSON", help="Llama-like or nemotron-nas")
    parser.add_argument("--hardware", default="h100-sxm", help="a data sheet's name")
    parser.add_argument("--engine", default="tensorrt-llm", choices=get_args(ModelledEngine), help="what is modelled")
    parser.add_argument("--precision", default="fp8", choices=get_args(Precision), help="of weights and KV cache")
    parser.add_argument("--scenario", default="128/1024", type=scenario, help="input/output tokens")
    parser.add_argument(
        "--tensor-parallel", default="best", type=count_or_best, help="devices that share a matrix, or best"
    )
    parser.add_argument("--batch", default="best", type=count_or_best, help="sequences at once, or best")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> None:
    """Estimate, print."""
    setting = EstimateSetting(
        args.hardware, args.engine, args.precision, args.scenario, args.tensor_parallel, args.batch
    )
    estimate = estimate_throughput(args.config, setting)
    sys.stdout.write(json.dumps(estimate.to_json()) + "\n" if args.json else estimate_text(estimate))


def estimate_text(estimate: ThroughputEstimate) -> str:
    """Return the numbers, and where the time goes; at most 100 columns."""
    setting, best = estimate.setting, estimate.best
    lines = [
        f"{best.tokens_per_s_per_gpu:,.0f} generated tokens/s per GPU, MODELLED ({estimate.engine.name})",
        f"  {setting.hardware} x {best.tensor_parallel}, {setting.precision}, {setting.scenario}, batch {best.batch}",
        f"  prefill {best.prefill_ms:,.1f} ms, then {best.step_ms:,.2f} ms a step, of the whole batch",
        f"  per GPU {best.weights_gib:.1f} GiB of weights, {best.kv_gib:.1f} GiB of KV cache",
        f"  {'component':<12} {'prefill ms':>12} {'step ms':>10}",
    ]
    for component, (prefill_ms, step_ms) in best.breakdown.items():
        lines.append(f"  {component:<12} {prefill_ms:>12,.1f} {step_ms:>10.3f}")
    return "\n".join([*lines, f"  constants fitted {estimate.engine.fitted}", ""])
