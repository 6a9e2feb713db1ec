"""Why a block is what it is: `python -m flows.explain --target like-51b --block 17`."""

import argparse
import sys

from flows.stage import run_cleanly
from storage.params import load
from storage.paths import Paths
from tasks.explain import Explanation, Option, explain


def explanation_text(found: Explanation) -> str:
    """A line for each variant that the block could have; fits 100 columns with up to three limits."""
    titles = " ".join(f"{limit:>18.18}" for limit in found.limits)
    lines = [
        f"block {found.block} of {found.target}: nats/token of its own, and of the best child that has it (predicted)",
        f"  {'variant':<20} {'score':>16} {'best child':>11} {titles}",
        *(_line(option) for option in found.options),
    ]
    chosen, *others = found.options
    rival = next((option for option in others if option.child_score is not None), None)
    if chosen.child_score is not None and rival is not None and rival.child_score is not None:
        lines.append(
            f"chosen: {chosen.replacement.name}; the next best, {rival.replacement.name}, makes the whole child worse "
            f"by {rival.child_score - chosen.child_score:.4f} nats/token"
        )
    return "\n".join([*lines, ""])


def _line(option: Option) -> str:
    of = option.replacement
    span = f" x{of.span}" if of.span > 1 else ""
    stderr = "" if option.score_stderr is None else f" ± {option.score_stderr:.4f}"
    child = "infeasible" if option.child_score is None else f"{option.child_score:.4f}"
    costs = " ".join(f"{cost:>18,.4g}" if cost < 1e4 else f"{cost:>18,.0f}" for cost in option.costs)
    mark, variant = "*" if option.is_chosen else " ", f"{of.attention.name} + {of.ffn.name}{span}"
    return f"{mark} {variant:<20} {f'{option.score:.4f}{stderr}':>16} {child:>11} {costs}"


def main() -> None:
    """Read the arguments, explain, print."""
    parser = argparse.ArgumentParser(prog="python -m flows.explain", description=__doc__)
    parser.add_argument("--target", required=True, help="key of the target in params.yaml, e.g. like-51b")
    parser.add_argument("--block", required=True, type=int, help="index of a parent block")
    args = parser.parse_args()
    sys.stdout.write(explanation_text(explain(args.target, args.block, load(), Paths())))


if __name__ == "__main__":
    run_cleanly(main)
