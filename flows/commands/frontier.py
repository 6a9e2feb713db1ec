"""Search quality against one metric of a target: many children, each proven to be the best at its limit."""

import argparse
import sys
from typing import TYPE_CHECKING

from flows.arguments import count, positive
from storage.params import load
from storage.paths import Paths

if TYPE_CHECKING:
    from tasks.commands.frontier import Frontier

EXAMPLE = "puzzle frontier --target like-51b --over decode --points 16"
_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--target", required=True, help="key of the target in params.yaml, e.g. like-51b")
    parser.add_argument("--over", required=True, help="name of the target's constraint whose limit is swept")
    parser.add_argument("--keep", action="append", default=[], metavar="NAME", help="a constraint that holds as well")
    parser.add_argument("--to", type=positive, help="value to end at (default: twice as good as the target asks for)")
    parser.add_argument("--points", type=count, default=64, help="values to try (default 64)")


def run(args: argparse.Namespace) -> None:
    """Sweep the limit, print."""
    from tasks.commands.frontier import frontier  # imports matplotlib

    sys.stdout.write(frontier_text(frontier(args.target, args.over, args.keep, args.to, args.points, load(), Paths())))


def frontier_text(children: "Frontier") -> str:
    """Return a few of the children as a table, the marginal price of more beside each, and where all of them are."""
    lines = [
        children.axis.replace("\n", " "),
        f"{'value':>9} {'score':>8} {'stderr':>8} {'gap':>8} {'price of 1 % more':>18} {'block params':>13} {'KV':>7}",
    ]
    step = max(1, len(children.rows) // _SHOWN)
    for row in children.rows[::step]:
        stderr = "-" if row.score_stderr is None else f"{row.score_stderr:.4f}"
        lines.append(
            f"{row.value:>9.4g} {row.score:>8.4f} {stderr:>8} {row.gap:>8.1e} "
            f"{row.price_per_percent:>18.5f} {row.block_params_ratio:>13.1%} {row.kv_ratio:>7.1%}"
        )
    proven = sum(row.status == "optimal" for row in children.rows)
    lines.append(
        f"{len(children.rows)} undominated children of {children.tried} tried, {proven} proven; predicted from tables"
    )
    return "\n".join([*lines, *children.files, ""])
