"""Quality against one metric of a target, many children proven. `python -m flows.frontier --target T --over decode`."""

import argparse
import sys

from flows.stage import run_cleanly
from storage.params import load
from storage.paths import Paths
from tasks.frontier import Frontier, frontier

_SHOWN = 12


def frontier_text(found: Frontier) -> str:
    """A few of the children as a table, the marginal price of more beside each, and where all of them are."""
    lines = [
        found.axis.replace("\n", " "),
        f"{'value':>9} {'score':>8} {'stderr':>8} {'gap':>8} {'price of 1 % more':>18} {'block params':>13} {'KV':>7}",
    ]
    step = max(1, len(found.rows) // _SHOWN)
    for row in found.rows[::step]:
        stderr = "-" if row["score_stderr"] is None else f"{row['score_stderr']:.4f}"
        lines.append(
            f"{row['value']:>9.4g} {row['score']:>8.4f} {stderr:>8} {row['gap']:>8.1e} "
            f"{row['price_per_percent']:>18.5f} {row['block_params_ratio']:>13.1%} {row['kv_ratio']:>7.1%}"
        )
    proven = sum(row["status"] == "optimal" for row in found.rows)
    lines.append(
        f"{len(found.rows)} undominated children of {found.tried} tried, {proven} proven; predicted from tables"
    )
    return "\n".join([*lines, *found.files, ""])


def main() -> None:
    """Read the arguments, sweep, print."""
    parser = argparse.ArgumentParser(prog="python -m flows.frontier", description=__doc__)
    parser.add_argument("--target", required=True, help="key of the target in params.yaml, e.g. like-51b")
    parser.add_argument("--over", required=True, help="name of the target's constraint whose limit is swept")
    parser.add_argument("--keep", action="append", default=[], metavar="NAME", help="a constraint that holds as well")
    parser.add_argument("--to", type=float, help="value to end at (default: twice as good as the target asks for)")
    parser.add_argument("--points", type=int, default=64, help="values to try (default 64)")
    args = parser.parse_args()
    found = frontier(args.target, args.over, args.keep, args.to, args.points, load(), Paths())
    sys.stdout.write(frontier_text(found))


if __name__ == "__main__":
    run_cleanly(main)
