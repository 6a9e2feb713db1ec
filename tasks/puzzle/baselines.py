"""Baselines of the search: what simpler ways choose from the same library under the same limits. No torch.

In: the Problem that the search solves. Out: replacements that cover the parent and keep every limit, or an
InfeasibleError. random and greedy are the ablations of the paper (arXiv 2411.19146, section 5); uniform is what people
do by hand; depth removes whole blocks. Baselines replace single blocks: spans are left to the search.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from storage.records import Attention, Ffn, Replacement
from tasks.puzzle.infeasible import InfeasibleError
from tasks.puzzle.problem import Choice, Limit, Problem


def with_random_scores(problem: Problem[Replacement], parent: Sequence[Replacement], seed: int) -> Problem[Replacement]:
    """The same problem with scores drawn from [0, 1): one for each attention and FFN variant of each block.

    The parent's own variants keep 0, so that the search still replaces no more than it must.
    """
    generator = random.Random(seed)
    own = {(block.first_block, variant) for block in parent for variant in (block.attention, block.ffn)}
    drawn: dict[tuple[int, int, Attention | Ffn], float] = {}

    def score(of: Replacement) -> float:
        total = 0.0
        for variant in (of.attention, of.ffn):
            if of.span > 1 or (of.first_block, variant) not in own:
                total += drawn.setdefault((of.first_block, of.span, variant), generator.random())
        return total

    return replace(
        problem, choices=tuple(replace(choice, score=score(choice.replacement)) for choice in problem.choices)
    )


@dataclass(frozen=True)
class _Blocks:
    """A problem's choices for single blocks, and sums over one choice for each."""

    problem: Problem[Replacement]
    index: dict[Replacement, int]

    @classmethod
    def of(cls, problem: Problem[Replacement]) -> "_Blocks":
        index = {choice.replacement: n for n, choice in enumerate(problem.choices) if choice.replacement.span == 1}
        return cls(problem, index)

    def check_parent(self, parent: Iterable[Replacement], name: str) -> None:
        """Raise InfeasibleError if the target forbids blocks of the parent, with which every baseline begins."""
        if not self.index.keys() >= set(parent):
            raise _infeasible(self.problem, name)

    def excesses(self, chosen: Iterable[Replacement]) -> list[float]:
        """How far each limit is exceeded, as a share of it; 0 where it is kept."""
        indices = [self.index[of] for of in chosen]
        totals = [(limit, limit.total(indices)) for limit in self.problem.limits]
        return [0.0 if limit.met_by(total) else (total - limit.upper) / abs(limit.upper) for limit, total in totals]

    def choices(self, chosen: Iterable[Replacement]) -> tuple[Choice[Replacement], ...]:
        return tuple(self.problem.choices[self.index[of]] for of in chosen)

    def relief(self, before: Replacement, after: Replacement, excesses: Sequence[float]) -> float:
        """By how much a replacement lowers the excesses, summed; no more of a limit counts than it is exceeded by.

        0 where it takes more of any limit than before, so that steps never undo each other.
        """
        shares = [_share(limit, self.index[before], self.index[after]) for limit in self.problem.limits]
        if min(shares) < 0:
            return 0.0
        return sum(min(excess, share) for excess, share in zip(excesses, shares, strict=True))


def _share(limit: Limit, old: int, new: int) -> float:
    return (limit.coefficients[old] - limit.coefficients[new]) / abs(limit.upper)


def greedy(problem: Problem[Replacement], parent: Sequence[Replacement]) -> tuple[Choice[Replacement], ...]:
    """From the parent on, take the replacement with the least score per relief of the limits, until all are kept."""
    blocks, chosen = _Blocks.of(problem), list(parent)
    blocks.check_parent(parent, "greedy")
    while any(excesses := blocks.excesses(chosen)):
        moves = []
        for after in blocks.index:
            before = chosen[after.first_block]
            if (relief := blocks.relief(before, after, excesses)) > 0:
                lost = blocks.choices([after])[0].score - blocks.choices([before])[0].score
                moves.append((lost / relief, after))
        if not moves:
            raise _infeasible(problem, "greedy")
        chosen[min(moves)[1].first_block] = min(moves)[1]
    return blocks.choices(chosen)


def depth(problem: Problem[Replacement], parent: Sequence[Replacement]) -> tuple[Choice[Replacement], ...]:
    """Remove whole blocks, those with the least score first, until all limits are kept."""
    blocks, chosen = _Blocks.of(problem), list(parent)
    blocks.check_parent(parent, "depth")
    removed = [of for of in blocks.index if of.attention.kind == of.ffn.kind == "no_op"]
    removed.sort(key=lambda of: blocks.choices([of])[0].score, reverse=True)
    while any(blocks.excesses(chosen)):
        if not removed:
            raise _infeasible(problem, "depth")
        block = removed.pop()
        chosen[block.first_block] = block
    return blocks.choices(chosen)


def uniform(problem: Problem[Replacement], parent: Sequence[Replacement]) -> tuple[Choice[Replacement], ...]:
    """One FFN width everywhere, or two adjacent ones; the fewest kv heads in evenly spaced blocks.

    First as few blocks with fewer kv heads as let the limits be kept at some width, then the widest FFNs that do. A
    block stays as it is where a variant is not allowed.
    """
    blocks, count = _Blocks.of(problem), len(parent)
    blocks.check_parent(parent, "uniform")
    widths = sorted({of.ffn for of in blocks.index if of.ffn.kind == "gated"}, reverse=True)
    fewest = min(of.attention for of in blocks.index if of.attention.kind == "gqa")

    def child(num_fewest: int, steps: int) -> list[Replacement]:
        """`steps` counts narrowings by one width, a block at a time, evenly spaced."""
        wide, num_narrow = divmod(steps, count)
        attentions, narrow = _spaced(num_fewest, count), _spaced(num_narrow, count)
        wanted = [
            replace(own, attention=fewest if n in attentions else own.attention, ffn=widths[wide + (n in narrow)])
            for n, own in enumerate(parent)
        ]
        return [of if of in blocks.index else own for of, own in zip(wanted, parent, strict=True)]

    last = (len(widths) - 1) * count
    for num_fewest in range(count + 1):
        if not any(blocks.excesses(child(num_fewest, last))):
            steps = next(n for n in range(last + 1) if not any(blocks.excesses(child(num_fewest, n))))
            return blocks.choices(child(num_fewest, steps))
    raise _infeasible(problem, "uniform")


def _spaced(number: int, count: int) -> set[int]:
    """`number` of `count` positions, evenly spaced."""
    return {(2 * n + 1) * count // (2 * number) for n in range(number)}


def _infeasible(problem: Problem[Replacement], name: str) -> InfeasibleError:
    return InfeasibleError(f"{problem.name}: the baseline {name!r} cannot keep all limits of the target")
