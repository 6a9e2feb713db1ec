"""The mixed-integer program of the search: choices that cover the parent's blocks, and limits on linear sums. No torch.

    minimise    sum_c score_c x_c                     (arXiv 2411.19146, section 3.3, with spans: an exact cover)
    subject to  sum_{c covers block i} x_c = 1        for every block i of the parent
                sum_c coefficient_lc x_c <= upper_l   for every limit l and every rule
                x_c in {0, 1}

A choice is a pair of an attention and an FFN variant, so that a score measured for the pair needs nothing else.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from storage.files import InputError

TOLERANCE = 1e-9
"""A sum may exceed its limit by this share: rounding of sums in double precision, far below any unit of cost."""


class Covering(Protocol):
    """An object that takes the place of consecutive parent blocks: a Replacement, or a published library's variant."""

    @property
    def parent_blocks(self) -> range:
        """Return the blocks that it covers, `first` .. `first + span - 1`."""

    def __lt__(self, other: Any, /) -> bool:
        """Coverings have an order, so that problems have one."""


P = TypeVar("P", bound=Covering)


@dataclass(frozen=True)
class Choice(Generic[P]):
    """A replacement that the search may take, and what it costs in quality (nats/token)."""

    replacement: P
    score: float


@dataclass(frozen=True)
class Limit:
    """`constant` + the sum of `coefficients` over the chosen replacements must be at most `upper`.

    `coefficients` follow the problem's choices. `text` is the constraint as the user wrote it. For messages the sum is
    turned into the user's value: total * scale, or scale / total where `inverse` (throughput: at least); `unit`
    follows the number, e.g. "x the parent's". `upper` holds the user's limit times `tightening` (a safety margin), so
    that a reachable value divided by it is a limit that the user could set. `is_rule`: it is not the user's to loosen.
    """

    name: str
    text: str
    coefficients: tuple[float, ...]
    constant: float
    upper: float
    scale: float = 1.0
    inverse: bool = False
    unit: str = ""
    tightening: float = 1.0
    is_rule: bool = False

    def total(self, chosen: Iterable[int]) -> float:
        """Return the exact sum over chosen choices (indices), constant included."""
        return math.fsum([self.constant, *(self.coefficients[index] for index in chosen)])

    def restricted_to(self, indices: Sequence[int]) -> "Limit":
        """Return the limit of a problem that has these choices (indices) alone."""
        return replace(self, coefficients=tuple(self.coefficients[index] for index in indices))

    def met_by(self, total: float) -> bool:
        """Tell whether a sum keeps the limit."""
        return total <= self.upper + TOLERANCE * abs(self.upper)

    def in_user_units(self, total: float) -> float:
        """Return the user's value of a sum."""
        if self.inverse:
            return self.scale / total if total else math.inf
        return total * self.scale


@dataclass(frozen=True)
class Problem(Generic[P]):
    """A search problem: `choices` sorted by replacement, each replacement once, and the limits that hold.

    `name` is the target's, and `where` says where its limits are set. `rules` hold as well, but the solver gets those
    alone that would be broken (best_child.py): there may be one for each block, and nearly every child keeps them.
    """

    name: str
    num_blocks: int
    choices: tuple[Choice[P], ...]
    limits: tuple[Limit, ...]
    where: str = "its limits"
    rules: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        replacements = [choice.replacement for choice in self.choices]
        is_sorted = all(before < after for before, after in itertools.pairwise(replacements))
        assert is_sorted, "choices: sorted and distinct"
        assert all(len(limit.coefficients) == len(self.choices) for limit in (*self.limits, *self.rules))
        assert all(rule.is_rule for rule in self.rules)

    def score(self, chosen: Iterable[int]) -> float:
        """Return the exact sum of scores over chosen choices (indices)."""
        return math.fsum(self.choices[index].score for index in chosen)

    def restricted_to(self, indices: Sequence[int]) -> "Problem[P]":
        """Return the problem with these choices (indices) alone."""
        return replace(
            self,
            choices=tuple(self.choices[index] for index in indices),
            limits=tuple(limit.restricted_to(indices) for limit in self.limits),
            rules=tuple(rule.restricted_to(indices) for rule in self.rules),
        )

    def with_rules(self, rules: Sequence[Limit]) -> "Problem[P]":
        """Return the problem with some of its rules among its limits."""
        others = tuple(rule for rule in self.rules if rule not in rules)
        return replace(self, limits=(*self.limits, *rules), rules=others)

    def kept_by(self, chosen: Iterable[int]) -> bool:
        """Tell whether chosen choices (indices) keep every limit."""
        chosen = tuple(chosen)
        return all(limit.met_by(limit.total(chosen)) for limit in self.limits)


def check_cover(problem: Problem[Any]) -> None:
    """Raise InputError unless the choices can cover every block of the parent."""
    stops = defaultdict(list)
    for choice in problem.choices:
        blocks = choice.replacement.parent_blocks
        stops[blocks.start].append(blocks.stop)
    reached = {0}
    for block_index in range(problem.num_blocks):
        if block_index in reached:
            reached.update(stops[block_index])
    if problem.num_blocks not in reached:
        last = max(index for index in reached if index <= problem.num_blocks)
        raise InputError(
            f"{problem.name}: no set of replacements covers the parent's {problem.num_blocks} blocks: none that is "
            f"allowed goes on from block {last}"
        )
