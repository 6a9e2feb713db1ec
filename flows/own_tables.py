"""The search from a user's files, without params.yaml, artifacts or a server: arguments in, text or JSON out."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from storage.files import InputError
from storage.params import parse_section
from storage.sections import SearchArchitecture
from tasks.block_library import Wanted, search_library
from tasks.limits import solver_settings
from tasks.search_architecture import OwnTables, search_own


def search_own_tables() -> None:
    """`--scores S.parquet --costs C.parquet --target TARGET.yaml --out DIR`: writes the same files as the stage."""
    parser = _parser("Search a child from tables of your own; nothing else is read.")
    parser.add_argument("--scores", type=Path, required=True, help="scores.parquet (README: columns)")
    parser.add_argument("--costs", type=Path, required=True, help="costs.parquet")
    parser.add_argument("--target", type=Path, required=True, help="YAML: label, constraints, as in params.yaml")
    parser.add_argument("--parent", type=Path, help="the parent's config.json, for runtimes and workspace")
    parser.add_argument("--out", type=Path, required=True, help="folder for architecture.json and search.json")
    args = parser.parse_args()
    found = search_own(OwnTables(args.scores, args.costs, args.target, args.parent), _section(args), args.out)
    speed = "" if found.throughput_ratio is None else f", {found.throughput_ratio:.3f} times its speed"
    sys.stdout.write(
        f"predicted: score {found.score:.4f} nats/token (gap {found.gap:.1e}), {found.block_params_ratio:.1%} of the "
        f"parent's block parameters{speed}\nwrote {args.out / 'architecture.json'} and {args.out / 'search.json'}\n"
    )


def search_block_library() -> None:
    """`--block-library LIB.json --limit STAT=N ... --metric NAME`: prints the answer as text, or as one JSON object."""
    parser = _parser("Search a block library: one JSON file of stats and metrics per layer and variant.")
    parser.add_argument("--block-library", type=Path, required=True, metavar="LIB.json")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="STAT=N", help="the sum over layers is at most N"
    )
    parser.add_argument("--metric", required=True, help="whose sum over layers is least, e.g. kl_div")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    section = _section(args)
    limits = dict(map(_limit, args.limit))
    if len(limits) < len(args.limit):
        raise InputError("--limit names a stat twice; keep one")
    wanted = Wanted(args.metric, limits, section.alternatives, section.min_distance)
    found, error = search_library(args.block_library, wanted, solver_settings(section, seed=0))
    sys.stdout.write(json.dumps(found) + "\n" if args.json else _library_text(found))
    if error is not None:
        raise error


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows.search_architecture", description=description)
    fields = SearchArchitecture.model_fields
    parser.add_argument("--solver", default="highs", help=fields["solver"].description)
    parser.add_argument("--relative-gap", type=float, default=1e-6, help=fields["relative_gap"].description)
    parser.add_argument("--alternatives", type=int, default=0, help=fields["alternatives"].description)
    parser.add_argument("--min-distance", type=float, default=0.2, help=fields["min_distance"].description)
    return parser


def _section(args: argparse.Namespace) -> SearchArchitecture:
    """The options as the section of params.yaml, checked like it."""
    names = ("solver", "relative_gap", "alternatives", "min_distance")
    return parse_section({name: getattr(args, name) for name in names}, "arguments", SearchArchitecture)


def _limit(text: str) -> tuple[str, float]:
    name, sign, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not sign or not name or not 0 < number < float("inf"):
        raise InputError(f"--limit {text}: expected STAT=N with a number above 0, such as runtime_ms=25")
    return name, number


def _library_text(found: dict[str, Any]) -> str:
    """For people: the proof, the totals beside their limits, the choices."""
    if found["status"] == "infeasible":
        return ""
    proof = f"bound {found['bound']:.6g}, gap {found['gap']:.1e}"
    lines = [f"{found['status']}: {found['metric']} {found['objective']:.6g}, {proof}"]
    for stat, total in found["totals"].items():
        limit = found["limits"].get(stat)
        used = f" of {limit['limit']:g}{', binds' if stat in found['binding'] else ''}" if limit else ""
        lines.append(f"  {stat:<24} {total:>14,.4g}{used}")
    lines += [f"  {layer:<10} {name}" for layer, name in found["choices"].items()]
    lines += [f"alternative: {found['metric']} {other['objective']:.6g}" for other in found["alternatives"]]
    return "\n".join([*lines, ""])
