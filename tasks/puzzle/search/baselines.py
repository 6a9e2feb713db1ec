"""Baselines of the search: what simpler ways choose from the same library under the same limits. No torch.

In: the Problem that the search solves, and the parent's own blocks. Out: replacements that cover the parent and keep
every limit, or an InfeasibleError. Random scores and greedy are ablations of the paper (arXiv 2411.19146, section 5);
uniform is what people do by hand; depth removes whole blocks. Baselines replace single blocks: spans are left to the
search.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.search.infeasible import InfeasibleError
from tasks.puzzle.search.problem import Choice, Limit, Problem


def with_random_scores(problem: Problem[Replacement], parent: Sequence[Replacement], seed: int) -> Problem[Replacement]:
    """Return the problem with scores drawn from [0, 1): a draw for each attention and FFN variant of each block.

    The parent's own variants keep 0, so that the search still replaces no more than it must.
    """
    generator = random.Random(seed)
    parent_variants = {(block.first_block, variant) for block in parent for variant in (block.attention, block.ffn)}
    drawn: dict[tuple[int, int, Attention | Ffn], float] = {}

    def score(replacement: Replacement) -> float:
        total = 0.0
        for variant in (replacement.attention, replacement.ffn):
            if replacement.span > 1 or (replacement.first_block, variant) not in parent_variants:
                key = (replacement.first_block, replacement.span, variant)
                total += drawn.setdefault(key, generator.random())
        return total

    choices = tuple(replace(choice, score=score(choice.replacement)) for choice in problem.choices)
    return replace(problem, choices=choices)


@dataclass(frozen=True)
class _SingleBlocks:
    """A problem's choices for single blocks by replacement, and sums over one choice for each block."""

    problem: Problem[Replacement]
    index: dict[Replacement, int]

    @classmethod
    def from_problem(cls, problem: Problem[Replacement]) -> "_SingleBlocks":
        index = {
            choice.replacement: number for number, choice in enumerate(problem.choices) if choice.replacement.span == 1
        }
        return cls(problem, index)

    def check_parent(self, parent: Iterable[Replacement], name: str) -> None:
        """Raise InfeasibleError if the target forbids blocks of the parent, with which every baseline begins."""
        if not self.index.keys() >= set(parent):
            raise _infeasible(self.problem, name)

    def excesses(self, chosen: Iterable[Replacement]) -> list[float]:
        """Return the share by which each limit is exceeded; 0 where it is kept."""
        indices = [self.index[replacement] for replacement in chosen]
        totals = [(limit, limit.total(indices)) for limit in self.problem.limits]
        return [0.0 if limit.met_by(total) else (total - limit.upper) / abs(limit.upper) for limit, total in totals]

    def score(self, replacement: Replacement) -> float:
        return self.problem.choices[self.index[replacement]].score

    def choices(self, chosen: Iterable[Replacement]) -> tuple[Choice[Replacement], ...]:
        return tuple(self.problem.choices[self.index[replacement]] for replacement in chosen)

    def relief(self, before: Replacement, after: Replacement, excesses: Sequence[float]) -> float:
        """Return the share of the exceeded limits that a replacement saves; each limit counts at most by its excess.

        The relief is 0 where it takes more of any limit than before, so that steps never undo each other.
        """
        shares = [_share(limit, self.index[before], self.index[after]) for limit in self.problem.limits]
        if min(shares) < 0:
            return 0.0
        return sum(min(excess, share) for excess, share in zip(excesses, shares, strict=True))


def _share(limit: Limit, before: int, after: int) -> float:
    """Return the share of a limit that is saved where one choice (index) takes the place of another."""
    return (limit.coefficients[before] - limit.coefficients[after]) / abs(limit.upper)


def greedy(problem: Problem[Replacement], parent: Sequence[Replacement]) -> tuple[Choice[Replacement], ...]:
    """Take, from the parent on, the replacement with the least score per relief of the limits, until all are kept."""
    blocks, chosen = _SingleBlocks.from_problem(problem), list(parent)
    blocks.check_parent(parent, "greedy")
    while any(excesses := blocks.excesses(chosen)):
        steps = []
        for after in blocks.index:
            before = chosen[after.first_block]
            if (relief := blocks.relief(before, after, excesses)) > 0:
                steps.append(((blocks.score(after) - blocks.score(before)) / relief, after))
        if not steps:
            raise _infeasible(problem, "greedy")
        _, cheapest = min(steps)
        chosen[cheapest.first_block] = cheapest
    return blocks.choices(chosen)


def depth(
    problem: Problem[Replacement], parent: Sequence[Replacement], order: Sequence[int] = ()
) -> tuple[Choice[Replacement], ...]:
    """Remove whole blocks until all limits are kept.

    Blocks go in the `order` that the joint KL of removals gave (removals.py) where the target allows it, then those
    with the least score first.
    """
    blocks, chosen = _SingleBlocks.from_problem(problem), list(parent)
    blocks.check_parent(parent, "depth")
    rank = {block: number for number, block in enumerate(order)}
    removals = [block for block in blocks.index if block.attention.kind == block.ffn.kind == "no_op"]
    removals.sort(key=lambda block: (rank.get(block.first_block, len(rank)), blocks.score(block)), reverse=True)
    while any(blocks.excesses(chosen)):
        if not removals:
            raise _infeasible(problem, "depth")
        removed = removals.pop()
        chosen[removed.first_block] = removed
    return blocks.choices(chosen)


def uniform(problem: Problem[Replacement], parent: Sequence[Replacement]) -> tuple[Choice[Replacement], ...]:
    """Choose one FFN width, or two adjacent ones, and one smaller attention in the blocks where it harms least.

    Of all kinds of attention (fewer kv heads, none) and numbers of blocks with it, each with the widest FFNs that keep
    the limits, take the child with the least sum of scores. A block stays as it is where a variant is not allowed.
    """
    blocks = _SingleBlocks.from_problem(problem)
    blocks.check_parent(parent, "uniform")
    widths = sorted({block.ffn for block in blocks.index if block.ffn.kind == "gated"}, reverse=True)
    children = [_widest(blocks, attentions, widths) for attentions in _attentions(blocks, parent)]
    within_limits = [child for child in children if not any(blocks.excesses(child))]
    if not within_limits:
        raise _infeasible(problem, "uniform")
    return blocks.choices(min(within_limits, key=lambda child: math.fsum(map(blocks.score, child))))


def _attentions(blocks: _SingleBlocks, parent: Sequence[Replacement]) -> Iterator[list[Replacement]]:
    """Yield the parent, then with one smaller attention in ever more blocks, those with the least scores first."""
    yield list(parent)
    for attention in sorted({block.attention for block in blocks.index} - {block.attention for block in parent}):
        replaced = [replace(block, attention=attention) for block in parent]
        chosen = list(parent)
        for block in sorted((block for block in replaced if block in blocks.index), key=blocks.score):
            chosen[block.first_block] = block
            yield list(chosen)


def _widest(blocks: _SingleBlocks, chosen: Sequence[Replacement], widths: Sequence[Ffn]) -> list[Replacement]:
    """Return the blocks with the widest FFNs that keep the limits; `widths` from the widest to the narrowest.

    The FFNs of evenly spaced blocks are narrowed by one width, until all have the next one; narrower ones are taken to
    need no more of any limit. The narrowest come back where even they exceed a limit.
    """

    def narrowed(steps: int) -> list[Replacement]:
        num_widths_down, num_narrower = divmod(steps, len(chosen))
        narrower, child = _spaced(num_narrower, len(chosen)), []
        for number, block in enumerate(chosen):
            candidate = replace(block, ffn=widths[num_widths_down + 1 if number in narrower else num_widths_down])
            child.append(candidate if candidate in blocks.index else block)
        return child

    most = (len(widths) - 1) * len(chosen)
    return narrowed(bisect_left(range(most), True, key=lambda steps: not any(blocks.excesses(narrowed(steps)))))


def _spaced(number: int, count: int) -> set[int]:
    """Return `number` of `count` positions, evenly spaced."""
    return {(2 * position + 1) * count // (2 * number) for position in range(number)}


def _infeasible(problem: Problem[Replacement], name: str) -> InfeasibleError:
    return InfeasibleError(f"{problem.name}: the baseline {name!r} cannot keep all limits of the target")
