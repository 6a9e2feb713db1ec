"""Speed of running servers under load: `python -m flows.benchmark_server parent=http://127.0.0.1:8000/v1`.

NAME=URL, or NAME=URL#MODEL where a server has several models, for as many servers as there are; rows of earlier runs
stay in the table, so that a child can be measured where the parent was before. A key is read from OPENAI_API_KEY.
"""

import argparse
import sys
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from flows.stage import run_cleanly
from storage.fields import Scenario
from storage.files import InputError
from storage.paths import Paths
from tasks.benchmark_server import SIX, Load, Server, benchmark_servers, serving_text


def _server(value: str) -> Server:
    name, equals, address = value.partition("=")
    url, _, model = address.partition("#")
    if not name or not equals or not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{value!r} is no server; expected NAME=http://HOST:PORT/v1[#MODEL]")
    if "@" in url or "?" in url:
        raise argparse.ArgumentTypeError(f"{name}: no password or key in the URL, which is kept; set OPENAI_API_KEY")
    return Server(name, url.rstrip("/"), model or None)


def _scenarios(value: str) -> tuple[str, ...]:
    if value == "six":
        return SIX
    try:
        return tuple(TypeAdapter(list[Scenario]).validate_python(value.split(",")))
    except ValidationError:
        text = f"{value!r}: expected INPUT/OUTPUT tokens with commas between, such as 128/128,2048/128, or six"
        raise argparse.ArgumentTypeError(text) from None


def _counts(value: str) -> tuple[int, ...]:
    found = value.split(",")
    if not all(one.isdecimal() and int(one) for one in found):
        raise argparse.ArgumentTypeError(f"{value!r}: expected numbers of at least 1 with commas between, such as 1,8")
    return tuple(dict.fromkeys(map(int, found)))


def _count(value: str) -> int:
    (found,) = _counts(value) if "," not in value else (0,)
    if not found:
        raise argparse.ArgumentTypeError(f"{value!r}: expected one number")
    return found


def _positive(value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{value!r}: expected a number above 0")
    return found


def main() -> None:
    """Read the arguments, load the servers, print."""
    parser = argparse.ArgumentParser(prog="python -m flows.benchmark_server", description=__doc__)
    parser.add_argument("servers", nargs="+", type=_server, metavar="NAME=URL[#MODEL]")
    parser.add_argument("--scenarios", type=_scenarios, default=("128/128",), help="128/128,2048/128 or six")
    parser.add_argument("--length-scale", type=_positive, default=1.0, help="of all lengths, for small machines")
    parser.add_argument("--concurrencies", type=_counts, default=(1, 2, 4, 8, 16, 32), help="requests at once")
    parser.add_argument("--rounds", type=_count, default=3, help="requests of each level, times its concurrency")
    parser.add_argument("--devices", type=_count, default=1, help="GPUs behind each of these servers")
    parser.add_argument("--stall", type=_positive, default=120.0, metavar="SECONDS", help="with no event: failed")
    parser.add_argument("--vocabulary", type=_count, default=30_000, help="token ids are drawn below it")
    parser.add_argument("--out", type=Path, default=Paths().serving, help="table; figures go beside it")
    args = parser.parse_args()
    if args.out.suffix != ".parquet":
        raise InputError(f"--out {args.out}: the table is a .parquet file; figures go beside it")
    if len({server.name for server in args.servers}) < len(args.servers):
        raise InputError("two servers have the same NAME; give each its own")
    wanted = Load(
        args.scenarios,
        args.length_scale,
        args.concurrencies,
        args.rounds,
        args.devices,
        args.stall,
        args.vocabulary,
    )
    rows = benchmark_servers(args.servers, wanted, args.out)
    sys.stdout.write(serving_text(rows, [server.name for server in args.servers]))
    sys.stdout.write(f"wrote {args.out}, {args.out.with_suffix('.svg').name}, {args.out.with_suffix('.png').name}\n")


if __name__ == "__main__":
    run_cleanly(main)
