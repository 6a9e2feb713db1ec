"""Replace-1-block scores, read: means, standard errors and the rule that adds them up. No torch.

In: rows of scores.parquet (a row per replacement and sequence shard). Out: the score of any replacement and of a whole
child, in nats per token: Puzzle's predictor is the sum over blocks (arXiv 2411.19146, section 3.2).

The rule: a replacement that was measured jointly has its own mean. Otherwise, for one block,
s(a, f) = s(a, parent's) + s(parent's, f), and the parent's own block scores 0. No replacement of a span scores 0, so
there s(a, f) = s(a, full) + s(full, f) - s(full, full).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self, get_args

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.records import Attention, Ffn, Replacement, ScoreRow, Weights
from tasks.puzzle.variants import parent_attention, parent_ffn


@dataclass(frozen=True)
class Score:
    """Quality lost, nats/token: mean and standard error over sequence shards (None with fewer than two shards)."""

    mean: float
    stderr: float | None


@dataclass(frozen=True)
class _Term:
    """A measured replacement in a sum: its sign and its rows by sequence shard."""

    sign: int
    shards: dict[int, ScoreRow]

    @property
    def mean(self) -> float:
        return self.sign * _weighted_mean([(row.tokens, row.kl) for row in self.shards.values()])


class Scores:
    """The scores of one parent's replacements, looked up by the rule."""

    def __init__(self, rows: Iterable[ScoreRow], attention: Attention, ffn: Ffn, around: str = "parent") -> None:
        """Index `rows`; `attention` and `ffn` are the parent's own variants; only rows `around` that model count."""
        self._parent = (attention, ffn)
        self._shards: defaultdict[tuple[Replacement, Weights], dict[int, ScoreRow]] = defaultdict(dict)
        for row in rows:
            if row.around == around:
                self._shards[row.replacement, row.weights][row.sequence_shard] = row

    @classmethod
    def of(cls, rows: Iterable[ScoreRow], config: ModelConfig) -> Self:
        """Scores around the parent that `config` describes."""
        return cls(rows, parent_attention(config), parent_ffn(config))

    def score(self, replacement: Replacement, weights: Weights) -> Score:
        """Score of one replacement whose variants were trained as `weights` says.

        Raises:
            InputError: a row that the rule needs is missing; the message says which and what there is.
        """
        return self.total([replacement], weights)

    def total(self, replacements: Sequence[Replacement], weights: Weights) -> Score:
        """Sum of scores: what the tables predict for a child.

        The standard error is that of the sum as measured shard by shard, so errors that replacements share
        (a hard passage is hard for all of them) add up as they should; it uses the shards that all terms have.
        """
        return _sum([term for replacement in replacements for term in self._terms(replacement, weights)])

    def difference(self, one: Sequence[Replacement], other: Sequence[Replacement], weights: Weights) -> Score:
        """Score of `one` less that of `other`; what both hold cancels, its error as well.

        Raises:
            InputError: a row that the rule needs is missing.
        """
        more = [term for of in one if of not in other for term in self._terms(of, weights)]
        less = [term for of in other if of not in one for term in self._terms(of, weights)]
        return _sum([*more, *(_Term(-term.sign, term.shards) for term in less)])

    def replacements(self, weights: Weights) -> tuple[Replacement, ...]:
        """All replacements that have a score by the rule, sorted; the parent's own blocks are not among them."""
        attention, ffn = self._parent
        measured = {key for key, of in self._shards if of == weights or not self._has_weights(key)}
        found = set(measured)
        for place in {(key.first_block, key.span) for key in measured}:
            here = [key for key in measured if (key.first_block, key.span) == place]
            attentions = {key.attention for key in here if key.ffn == ffn} | {attention}
            ffns = {key.ffn for key in here if key.attention == attention} | {ffn}
            pairs = (Replacement(*place, a, f) for a, f in itertools.product(attentions, ffns))
            found |= {pair for pair in pairs if self._rule(pair, weights) is not None}
        return tuple(sorted(key for key in found if not self._is_parent(key)))

    def _terms(self, replacement: Replacement, weights: Weights) -> list[_Term]:
        terms = self._rule(replacement, weights)
        if terms is None:
            here = sorted(
                f"{key.attention.name} + {key.ffn.name} ({of})"
                for key, of in self._shards
                if (key.first_block, key.span) == (replacement.first_block, replacement.span)
            )
            raise InputError(
                f"{replacement.name} has no {weights} score, and the rows to add it up from are not all there "
                f"(measured here: {', '.join(here) or 'nothing'}); run `dvc repro score_blocks`"
            )
        return terms

    def _rule(self, replacement: Replacement, weights: Weights) -> list[_Term] | None:
        """The signed measurements that make up a score; None where one of them is missing."""
        if self._is_parent(replacement):
            return []
        if joint := self._measured(replacement, weights):
            return [_Term(1, joint)]
        attention, ffn = self._parent
        parts = [(1, replace(replacement, ffn=ffn)), (1, replace(replacement, attention=attention))]
        if replacement.span > 1:
            parts.append((-1, replace(replacement, attention=attention, ffn=ffn)))
        if replacement in {part for _, part in parts}:
            return None
        terms = [_Term(sign, self._measured(part, weights)) for sign, part in parts]
        return terms if all(term.shards for term in terms) else None

    def _measured(self, replacement: Replacement, weights: Weights) -> dict[int, ScoreRow]:
        """Rows by shard. What has no weights of its own (no-ops) is the same replacement under every training."""
        if (rows := self._shards.get((replacement, weights))) or self._has_weights(replacement):
            return rows or {}
        candidates: list[dict[int, ScoreRow]] = [
            self._shards.get((replacement, other), {}) for other in get_args(Weights)
        ]
        return max(candidates, key=len)

    def _is_parent(self, replacement: Replacement) -> bool:
        return replacement.span == 1 and (replacement.attention, replacement.ffn) == self._parent

    def _has_weights(self, replacement: Replacement) -> bool:
        """Whether a half of it was made by us: neither a no-op nor, in one block, the parent's own."""
        attention, ffn = self._parent
        own_attention = replacement.attention.kind != "no_op" and (
            replacement.span > 1 or replacement.attention != attention
        )
        own_ffn = replacement.ffn.kind != "no_op" and (replacement.span > 1 or replacement.ffn != ffn)
        return own_attention or own_ffn


def _sum(terms: Sequence[_Term]) -> Score:
    """The signed sum of measurements, with its standard error over the shards that all have."""
    if not terms:
        return Score(0.0, 0.0)
    common = sorted(set.intersection(*(set(term.shards) for term in terms)))
    sums = [
        (terms[0].shards[shard].tokens, math.fsum(term.sign * term.shards[shard].kl for term in terms))
        for shard in common
    ]
    return Score(math.fsum(term.mean for term in terms), _stderr(sums))


def _weighted_mean(values: Sequence[tuple[int, float]]) -> float:
    return math.fsum(weight * value for weight, value in values) / sum(weight for weight, _ in values)


def _stderr(values: Sequence[tuple[int, float]]) -> float | None:
    """Standard error of a mean of shards weighted by tokens; with equal weights it is s / sqrt(n).

    Cochran, Sampling Techniques, 3rd ed., section 6.4: the ratio estimator's variance with n / (n - 1).
    """
    count = len(values)
    if count < 2:
        return None
    mean = _weighted_mean(values)
    spread = math.fsum((weight * (value - mean)) ** 2 for weight, value in values)
    return math.sqrt(spread * count / (count - 1)) / sum(weight for weight, _ in values)
