"""Measure the speed of running servers under load, at several numbers of requests at once (docs/costs.md).

NAME=URL, or NAME=URL#MODEL where a server has several models, for as many servers as there are; rows of earlier runs
stay in the table, so that a child can be measured where the parent was before. A key is read from OPENAI_API_KEY. No
proxy is asked without --proxy.
"""

import argparse
import sys
from pathlib import Path

from flows.arguments import count, counts, positive, scenario
from flows.errors import printable
from storage.files import InputError
from storage.paths import Paths
from tasks.commands.benchmark_server import PUBLISHED_SCENARIOS, LoadSweep, Server, benchmark_servers, serving_text

EXAMPLE = "puzzle benchmark-server parent=http://127.0.0.1:8000/v1 --scenarios six --concurrencies 1,8,25,64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("servers", nargs="+", type=_server, metavar="NAME=URL[#MODEL]")
    parser.add_argument("--scenarios", type=_scenarios, default=("128/128",), help="128/128,2048/128 or six")
    parser.add_argument("--length-scale", type=positive, default=1.0, help="of all lengths, for small machines")
    parser.add_argument("--concurrencies", type=counts, default=(1, 2, 4, 8, 16, 32), help="requests at once")
    parser.add_argument("--rounds", type=count, default=3, help="requests of each level, times its concurrency")
    parser.add_argument("--devices", type=count, default=1, help="GPUs behind each of these servers")
    parser.add_argument("--stall", type=positive, default=120.0, metavar="SECONDS", help="with no event: failed")
    parser.add_argument("--vocabulary", type=count, default=30_000, help="token ids are drawn below it")
    plain = "text prompts and no fixed output length, for servers that refuse others (tokenizer: artifacts/parent)"
    parser.add_argument("--plain", action="store_true", help=plain)
    parser.add_argument("--proxy", action="store_true", help="ask the proxy that the environment names")
    parser.add_argument("--out", type=Path, default=Paths().serving, help="table; figures go beside it")


def run(args: argparse.Namespace) -> None:
    """Load the servers, print."""
    if args.out.suffix != ".parquet":
        raise InputError(f"--out {args.out}: the table is a .parquet file; figures go beside it")
    if len({server.name for server in args.servers}) < len(args.servers):
        raise InputError("two servers have the same NAME; give each its own")
    requests = LoadSweep(
        args.scenarios,
        args.length_scale,
        args.concurrencies,
        args.rounds,
        args.devices,
        args.stall,
        args.vocabulary,
        args.plain,
        args.proxy,
    )
    rows = benchmark_servers(args.servers, requests, args.out)
    sys.stdout.write(printable(serving_text(rows, [server.name for server in args.servers])))
    sys.stdout.write(f"wrote {args.out}, {args.out.with_suffix('.svg').name}, {args.out.with_suffix('.png').name}\n")


def _server(text: str) -> Server:
    name, equals, address = text.partition("=")
    url, _, model = address.partition("#")
    if not name or not equals or not url.startswith(("http://", "https://")) or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no server; expected NAME=http://HOST:PORT/v1[#MODEL]")
    if "@" in url or "?" in url:
        raise argparse.ArgumentTypeError(f"{name}: no password or key in the URL, which is kept; set OPENAI_API_KEY")
    return Server(name, url.rstrip("/"), model or None)


def _scenarios(text: str) -> tuple[str, ...]:
    if text == "six":
        return PUBLISHED_SCENARIOS
    try:
        return tuple(scenario(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        message = f"{text!r}: expected INPUT/OUTPUT tokens with commas between, such as 128/128,2048/128, or six"
        raise argparse.ArgumentTypeError(message) from None
