"""Replace-1-block scores from the table: means, standard errors and the rule that adds them up. No torch.

In: rows of scores.parquet (a row per replacement and calibration sequence). Out: the score of any replacement and of a
whole child, in nats per token: Puzzle's predictor is the sum over blocks (arXiv 2411.19146, section 3.2). KL differs
more from sequence to sequence than from one replacement to the next, so all scores of one kind of weights are means
over the same sequences: those that all of its measurements have.

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
from storage.records import ScoreRow, Weights
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tasks.puzzle.standard_error import standard_error


@dataclass(frozen=True)
class Score:
    """Quality lost, nats/token: mean and standard error over calibration documents (None with fewer than two)."""

    mean: float
    stderr: float | None


@dataclass(frozen=True)
class _Term:
    """A measured replacement in a sum: its sign and its rows by calibration sequence."""

    sign: int
    rows: dict[int, ScoreRow]

    @property
    def mean(self) -> float:
        rows = self.rows.values()
        return self.sign * math.fsum(row.tokens * row.kl for row in rows) / sum(row.tokens for row in rows)


class Scores:
    """The scores of one parent's replacements, looked up by the rule."""

    def __init__(self, rows: Iterable[ScoreRow], attention: Attention, ffn: Ffn, around: str = "parent") -> None:
        """Index `rows`; `attention` and `ffn` are the parent's own variants; only rows `around` that model count."""
        self._parent = (attention, ffn)
        self._rows_by_sequence: defaultdict[tuple[Replacement, Weights], dict[int, ScoreRow]] = defaultdict(dict)
        for row in rows:
            if row.around == around:
                self._rows_by_sequence[row.replacement, row.weights][row.sequence_shard] = row
        self._sequences: dict[Weights, frozenset[int]] = {}

    @classmethod
    def from_rows(cls, rows: Iterable[ScoreRow], config: ModelConfig) -> Self:
        """Return the scores around the parent that `config` describes."""
        return cls(rows, parent_attention(config), parent_ffn(config))

    def score(self, replacement: Replacement, weights: Weights) -> Score:
        """Return the score of a replacement whose variants were trained as `weights` says.

        Raises:
            InputError: a row that the rule needs is missing; the message says which, and which rows exist.
        """
        return self.total([replacement], weights)

    def total(self, replacements: Sequence[Replacement], weights: Weights) -> Score:
        """Return the sum of scores, which the tables predict for a child.

        The standard error is that of the sum as measured sequence by sequence, so errors that replacements share
        (a hard passage is hard for all of them) add up as they should.
        """
        return _sum([term for replacement in replacements for term in self._terms(replacement, weights)])

    def difference(self, replacements: Sequence[Replacement], others: Sequence[Replacement], weights: Weights) -> Score:
        """Return the score of `replacements` less that of `others`; replacements of both cancel, their error as well.

        Raises:
            InputError: a row that the rule needs is missing.
        """
        terms = []
        for replacement in replacements:
            if replacement not in others:
                terms += self._terms(replacement, weights)
        for other in others:
            if other not in replacements:
                terms += [_Term(-term.sign, term.rows) for term in self._terms(other, weights)]
        return _sum(terms)

    def replacements(self, weights: Weights) -> tuple[Replacement, ...]:
        """Return all replacements that have a score by the rule, sorted; the parent's own blocks are not among them."""
        measured = {key for key, trained in self._rows_by_sequence if trained == weights or not self._has_weights(key)}
        scored = set(measured)
        for first_block, span in {(key.first_block, key.span) for key in measured}:
            span_measured = [key for key in measured if (key.first_block, key.span) == (first_block, span)]
            for attention, ffn in self._pairs(span_measured):
                pair = Replacement(first_block, span, attention, ffn)
                if self._rule(pair, weights) is not None:
                    scored.add(pair)
        return tuple(sorted(key for key in scored if not self._is_parent(key)))

    def _pairs(self, measured: Sequence[Replacement]) -> Iterable[tuple[Attention, Ffn]]:
        """Return all pairs of halves that were measured beside the parent's other half, the parent's own among them."""
        attention, ffn = self._parent
        attentions = {replacement.attention for replacement in measured if replacement.ffn == ffn} | {attention}
        ffns = {replacement.ffn for replacement in measured if replacement.attention == attention} | {ffn}
        return itertools.product(attentions, ffns)

    def _terms(self, replacement: Replacement, weights: Weights) -> list[_Term]:
        terms = self._rule(replacement, weights)
        if terms is None:
            measured = sorted(
                f"{key.attention.name} + {key.ffn.name} ({trained})"
                for key, trained in self._rows_by_sequence
                if (key.first_block, key.span) == (replacement.first_block, replacement.span)
            )
            raise InputError(
                f"{replacement.name} has no {weights} score, and not all rows to add it up from exist "
                f"(measured: {', '.join(measured) or 'nothing'}); run `dvc repro score_blocks`"
            )
        return terms

    def _rule(self, replacement: Replacement, weights: Weights) -> list[_Term] | None:
        """Return the signed measurements that make up a score; None where one of them is missing."""
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
        return terms if all(term.rows for term in terms) else None

    def _measured(self, replacement: Replacement, weights: Weights) -> dict[int, ScoreRow]:
        """Return the rows by sequence, of the sequences on which everything with such weights was measured."""
        rows = self._all_measured(replacement, weights)
        return {sequence: rows[sequence] for sequence in self._shared_sequences(weights)} if rows else {}

    def _shared_sequences(self, weights: Weights) -> frozenset[int]:
        """Return the sequences that all measurements with such weights have.

        Raises:
            InputError: there is none.
        """
        if weights not in self._sequences:
            rows = (self._all_measured(replacement, weights) for replacement, _ in self._rows_by_sequence)
            shared = frozenset[int].intersection(*(frozenset(measured) for measured in rows if measured))
            if not shared:
                raise InputError(
                    f"the {weights} scores have no calibration sequence in common, so they cannot be compared; run "
                    "`dvc repro score_blocks`"
                )
            self._sequences[weights] = shared
        return self._sequences[weights]

    def _all_measured(self, replacement: Replacement, weights: Weights) -> dict[int, ScoreRow]:
        """Return rows by sequence; a replacement without weights of its own (no-ops) is alike under every training."""
        if (rows := self._rows_by_sequence.get((replacement, weights))) or self._has_weights(replacement):
            return rows or {}
        candidates: list[dict[int, ScoreRow]] = [
            self._rows_by_sequence.get((replacement, other), {}) for other in get_args(Weights)
        ]
        return max(candidates, key=len)

    def _is_parent(self, replacement: Replacement) -> bool:
        return replacement.span == 1 and (replacement.attention, replacement.ffn) == self._parent

    def _has_weights(self, replacement: Replacement) -> bool:
        """Tell whether a half of it was trained: neither a no-op nor, in a single block, the parent's own."""
        attention, ffn = self._parent
        is_span = replacement.span > 1
        trained_attention = replacement.attention.kind != "no_op" and (is_span or replacement.attention != attention)
        trained_ffn = replacement.ffn.kind != "no_op" and (is_span or replacement.ffn != ffn)
        return trained_attention or trained_ffn


def _sum(terms: Sequence[_Term]) -> Score:
    """Return the signed sum of measurements on the same sequences, with its standard error over their documents."""
    if not terms:
        return Score(0.0, 0.0)
    sequences = sorted(terms[0].rows)
    sums = [math.fsum(term.sign * term.rows[sequence].kl for term in terms) for sequence in sequences]
    first = [terms[0].rows[sequence] for sequence in sequences]
    stderr = standard_error(sums, [row.document for row in first], [row.tokens for row in first])
    return Score(math.fsum(term.mean for term in terms), stderr)
