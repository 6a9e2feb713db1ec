"""Search a child from a user's files, without params.yaml, artifacts or a server (docs/search.md).

Either from tables (--scores, --costs, --target, --out; optionally --parent), which writes the same files as the stage
search_architecture, or from a block library that others published (--block-library, --metric, --limit), one JSON
file of stats and metrics per layer and variant, which prints the answer as text or as one JSON object (--json).
"""

import argparse
import json
import sys
from pathlib import Path

from flows.errors import printable
from storage.files import InputError
from storage.params import parse_section
from storage.published_library import MAX_NUMBER
from storage.sections import SearchArchitecture
from tasks.commands.published_library import (
    PublishedLibraryAnswer,
    PublishedLibraryQuery,
    infeasible_answer,
    search_published_library,
)
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.targets.target_tables import solver_settings

EXAMPLE = (
    "puzzle search --block-library LIB.json --limit runtime_ms=900 --limit memory_mib=70000 --metric kl_div --json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    tables = parser.add_argument_group("from tables")
    tables.add_argument("--scores", type=Path, help="scores.parquet (columns: storage/tables.py)")
    tables.add_argument("--costs", type=Path, help="costs.parquet")
    tables.add_argument("--target", type=Path, help="YAML: label, constraints, as in params.yaml")
    tables.add_argument("--parent", type=Path, help="the parent's config.json, for runtimes and workspace")
    tables.add_argument("--out", type=Path, help="folder for architecture.json and search.json")
    library = parser.add_argument_group("from a published block library")
    library.add_argument("--block-library", type=Path, metavar="LIB.json")
    library.add_argument(
        "--limit", action="append", default=[], metavar="STAT=N", help="the sum over layers is at most N"
    )
    library.add_argument("--metric", help="whose sum over layers is least, e.g. kl_div")
    library.add_argument("--json", action="store_true", help="one JSON object on stdout")
    fields = SearchArchitecture.model_fields
    parser.add_argument("--relative-gap", type=float, default=1e-6, help=fields["relative_gap"].description)
    parser.add_argument("--alternatives", type=int, default=0, help=fields["alternatives"].description)
    parser.add_argument("--min-distance", type=float, default=0.2, help=fields["min_distance"].description)


def run(args: argparse.Namespace) -> None:
    """Search in the files that are given."""
    if args.block_library is not None:
        _check_given(args, "block_library", ("metric",), ("scores", "costs", "target", "parent", "out"))
        _search_published_library(args)
    else:
        _check_given(args, "scores", ("scores", "costs", "target", "out"), ("metric", "limit", "json"))
        _search_tables(args)


def _check_given(args: argparse.Namespace, mode: str, needed: tuple[str, ...], excluded: tuple[str, ...]) -> None:
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        raise InputError(
            f"missing: {', '.join(missing)}; give --scores, --costs, --target and --out, or --block-library and "
            "--metric (`puzzle search --help`)"
        )
    surplus = [f"--{name}" for name in excluded if getattr(args, name)]
    if surplus:
        raise InputError(f"{', '.join(surplus)} cannot stand beside --{mode.replace('_', '-')}; leave it out")


def _search_tables(args: argparse.Namespace) -> None:
    """Write architecture.json and search.json to --out, print what is predicted."""
    from tasks.search_architecture import OwnTables, search_own  # imports Prefect

    child = search_own(OwnTables(args.scores, args.costs, args.target, args.parent), _section(args), args.out)
    speed = "" if child.throughput_ratio is None else f", {child.throughput_ratio:.3f} times its speed"
    how = child.chosen_by if child.gap is None else f"gap {child.gap:.1e}"
    sys.stdout.write(
        f"predicted: score {child.score:.4f} nats/token ({how}), {child.block_params_ratio:.1%} of the "
        f"parent's block parameters{speed}\nwrote {args.out / 'architecture.json'} and {args.out / 'search.json'}\n"
    )


def _search_published_library(args: argparse.Namespace) -> None:
    """Print the answer as text or as one JSON object; JSON answers where no choice keeps all limits, too."""
    section = _section(args)
    limits = dict(map(_limit, args.limit))
    if len(limits) < len(args.limit):
        raise InputError("--limit names a stat twice; keep one")
    query = PublishedLibraryQuery(args.metric, limits, section.alternatives, section.min_distance)
    try:
        answer = search_published_library(args.block_library, query, solver_settings(section, seed=0))
    except InfeasibleError as error:
        if args.json:
            sys.stdout.write(json.dumps(infeasible_answer(error)) + "\n")
        raise
    sys.stdout.write(json.dumps(answer) + "\n" if args.json else printable(_answer_text(answer)))


def _section(args: argparse.Namespace) -> SearchArchitecture:
    """Return the options as the section of params.yaml, checked like it."""
    names = ("relative_gap", "alternatives", "min_distance")
    return parse_section({name: getattr(args, name) for name in names}, "arguments", SearchArchitecture)


def _limit(text: str) -> tuple[str, float]:
    """Return stat and number of `STAT=N`."""
    name, sign, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not sign or not name or not 0 < number <= MAX_NUMBER:
        expected = f"expected STAT=N with a number above 0, at most {MAX_NUMBER:g}, such as runtime_ms=25"
        raise InputError(f"--limit {text}: {expected}")
    return name, number


def _answer_text(answer: PublishedLibraryAnswer) -> str:
    """Return the proof, the totals beside their limits, the choices."""
    proof = f"bound {answer['bound']:.6g}, gap {answer['gap']:.1e}"
    lines = [f"{answer['status']}: {answer['metric']} {answer['objective']:.6g}, {proof}"]
    for stat, total in answer["totals"].items():
        used = ""
        if stat in answer["limits"]:
            used = f" of {answer['limits'][stat]['limit']:g}{', binds' if stat in answer['binding'] else ''}"
        lines.append(f"  {stat:<24} {total:>14,.4g}{used}")
    lines += [f"  {layer:<10} {name}" for layer, name in answer["choices"].items()]
    lines += [f"alternative: {answer['metric']} {choice['objective']:.6g}" for choice in answer["alternatives"]]
    return "\n".join([*lines, ""])
