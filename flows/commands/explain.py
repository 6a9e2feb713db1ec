"""Explain why a block is what it is: every variant that it could have, its score, its costs, the best child with it."""

import argparse
import sys
from collections.abc import Iterable

from storage.params import load
from storage.paths import Paths
from tasks.commands.explain import Explanation, Option, explain

EXAMPLE = "puzzle explain --target like-51b --block 17"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--target", required=True, help="key of the target in params.yaml, e.g. like-51b")
    parser.add_argument("--block", required=True, type=int, help="index of a parent block")


def run(args: argparse.Namespace) -> None:
    """Explain the block, print."""
    sys.stdout.write(explanation_text(explain(args.target, args.block, load(), Paths())))


def explanation_text(explanation: Explanation) -> str:
    """Return a line for each variant that the block could have; it fits 100 columns with up to three limits."""
    names, units = zip(*(limit.rstrip("]").split(" [") for limit in explanation.limits), strict=True)
    lines = [
        f"block {explanation.block} of {explanation.target}: nats/token of its own, and of the best child that has it "
        "(predicted)",
        f"  {'variant':<20} {'score':>16} {'best child':>11} {_columns(names)}",
        f"  {'':<20} {'':>16} {'':>11} {_columns(units)}",
        *(_line(option) for option in explanation.options),
    ]
    chosen, *others = explanation.options
    rival = next((option for option in others if option.child_score is not None), None)
    if chosen.child_score is not None and rival is not None and rival.child_score is not None:
        worse = rival.child_score - chosen.child_score
        lines += [
            f"chosen: {_variant(chosen)}; the next best is {_variant(rival)}, with which the whole child would be",
            f"worse by {worse:.4f} nats/token",
        ]
    return "\n".join([*lines, ""])


def _columns(texts: Iterable[str]) -> str:
    return " ".join(f"{text:>15.15}" for text in texts)


def _variant(option: Option) -> str:
    replacement = option.replacement
    name = f"{replacement.attention.name} + {replacement.ffn.name}"
    return f"{name} x{replacement.span}" if replacement.span > 1 else name


def _line(option: Option) -> str:
    stderr = "" if option.score_stderr is None else f" ± {option.score_stderr:.4f}"
    child = "infeasible" if option.child_score is None else f"{option.child_score:.4f}"
    costs = _columns(f"{cost:,.4g}" if cost < 1e4 else f"{cost:,.0f}" for cost in option.costs)
    mark = "*" if option.is_chosen else " "
    return f"{mark} {_variant(option):<20} {f'{option.score:.4f}{stderr}':>16} {child:>11} {costs}"
