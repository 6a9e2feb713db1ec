"""Packing: documents go in; token sequences of splits come out, which share no document and no long paragraph.

Documents are put in an order that depends on nothing but their text and the seed (within windows of WINDOW_CHARS, so
that a huge source is not read to its end), and fill one split after the other: held-out domains, validation,
calibration, train in this project. What repeats an earlier document is taken out on the way
(tasks/puzzle/corpus/repeats.py).

Train is packed without gaps. In held-out splits a sequence begins where a document begins and a document gives one
sequence, so that sequences are independent of each other as far as documents are; what is left of a long document is
used only where a source has no more documents for the split.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from storage.documents import Document, PackedSequence, Source, Tokens, order_key
from storage.files import InputError
from tasks.puzzle.corpus.repeats import Repeats

WINDOW_CHARS = 1 << 20
"""Documents are shuffled within windows of this much text (about a quarter of a million tokens)."""

_DOCUMENTS_PER_BATCH = 64

Encode = Callable[[Sequence[Document]], Sequence[list[int] | None]]
"""Gives the token ids of each document, without separator; it applies the chat template. None: it is left out."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Feed:
    """A stream of documents, and the weight of its share of the tokens among the feeds of its mix."""

    name: str
    weight: float
    documents: Iterable[Document]


@dataclass(frozen=True)
class SplitPlan:
    """A split to fill, and the feeds that fill it.

    Attributes:
        name: the split.
        mix: the feeds that it takes documents from, by the name of their mix.
        tokens: its budget, a multiple of the sequence length.
        every: a held-out split takes every so many documents of a feed and leaves the others to the splits after it, so
            that a source of a few long documents is enough for all; None: all documents, packed without gaps.
        key: the key of params.yaml that holds the budget.
    """

    name: str
    mix: str
    tokens: int
    every: int | None
    key: str


@dataclass(frozen=True)
class TokenisedDocument:
    """A document's tokens with the separator, int32 [tokens]."""

    document: Document
    tokens: Tokens


@dataclass(frozen=True)
class _Part:
    """Tokens of a document in a sequence; `is_first`: they are the document's first ones."""

    source: Source
    tokens: Tokens
    is_first: bool


class Packer:
    """Fills the splits one after the other, and counts documents and tokens by split, and by mix and source."""

    def __init__(
        self,
        mixes: Mapping[str, Sequence[Feed]],
        plans: Sequence[SplitPlan],
        seq_len: int,
        encode: Encode,
        separator: int,
        seed: int,
    ) -> None:
        """Prepare the streams; nothing is read yet.

        Args:
            mixes: the feeds of each mix.
            plans: the splits, in the order in which they will be taken.
            seq_len: tokens per sequence.
            encode: tokenizer of documents.
            separator: token id after each document.
            seed: orders the documents.
        """
        assert all(plan.tokens % seq_len == 0 for plan in plans), (plans, seq_len)
        self._mixes = dict(mixes)
        self._plans = {plan.name: plan for plan in plans}
        self._seq_len = seq_len
        self._encode = encode
        self._separator = separator
        self._seed = seed
        self._repeats = Repeats()
        self._streams = {mix: [self._tokenised(feed) for feed in feeds] for mix, feeds in mixes.items()}
        self._unused: Counter[str] = Counter()
        self.tokens = dict.fromkeys(self._plans, 0)
        self.documents: Counter[str] = Counter()
        self.documents_of: Counter[tuple[str, Source]] = Counter()
        self.tokens_of: Counter[tuple[str, Source]] = Counter()

    @property
    def left_out(self) -> int:
        """Count the documents left out so far because they repeat others."""
        return self._repeats.left_out

    def sequences(self, split: str) -> Iterator[PackedSequence]:
        """Yield the sequences of a split to its budget; to be exhausted before the next split begins.

        Raises:
            InputError: the feeds do not hold enough tokens, the message has how many each split got.
        """
        plan = self._plans[split]
        with tqdm(total=plan.tokens, unit=" tokens", unit_scale=True, desc=f"pack {split}", disable=None) as progress:
            for sequence in self._dense(plan) if plan.every is None else self._held_out(plan, plan.every):
                progress.update(self._seq_len)
                yield sequence

    def _dense(self, plan: SplitPlan) -> Iterator[PackedSequence]:
        """Pack documents without gaps; the last one is cut."""
        row, used, begins = np.empty(self._seq_len, np.int32), 0, 0
        for tokens in self._take(plan):
            start = 0
            while start < len(tokens):
                if used == 0:
                    begins = self.documents[plan.name] - 1
                count = min(self._seq_len - used, len(tokens) - start)
                row[used : used + count] = tokens[start : start + count]
                start, used = start + count, used + count
                if used == self._seq_len:
                    yield PackedSequence(row, begins)
                    row, used = np.empty(self._seq_len, np.int32), 0

    def _take(self, plan: SplitPlan) -> Iterator[Tokens]:
        """Take tokens of documents, the next from the feed that is furthest behind its share; the last one is cut."""
        taken = [0] * len(self._mixes[plan.mix])
        while self.tokens[plan.name] < plan.tokens:
            feed = self._furthest_behind(plan.mix, taken)
            tokenised = next(self._streams[plan.mix][feed], None)
            if tokenised is None:
                raise InputError(self._shortage(plan, feed))
            tokens = tokenised.tokens[: plan.tokens - self.tokens[plan.name]]
            taken[feed] += len(tokens)
            self._count(plan, _Part(tokenised.document.source, tokens, is_first=True))
            yield tokens

    def _held_out(self, plan: SplitPlan, every: int) -> Iterator[PackedSequence]:
        """Pack sequences of one document each, or of several short ones of one feed."""
        streams, taken = self._streams[plan.mix], [0] * len(self._mixes[plan.mix])
        feeds = [_HeldOutFeed(stream, every, self._seq_len) for stream in streams]
        while self.tokens[plan.name] < plan.tokens:
            feed = self._furthest_behind(plan.mix, taken)
            taken[feed] += self._seq_len
            packed = feeds[feed].next_sequence(self.documents[plan.name])
            if packed is None:
                self._unused[plan.mix] += sum(held_out.unused for held_out in feeds)
                raise InputError(self._shortage(plan, feed))
            number, parts = packed
            for part in parts:
                self._count(plan, part)
            yield PackedSequence(np.concatenate([part.tokens for part in parts]), number)
        self._unused[plan.mix] += sum(held_out.unused for held_out in feeds)
        self._streams[plan.mix] = [
            chain(held_out.between, stream) for held_out, stream in zip(feeds, streams, strict=True)
        ]

    def _furthest_behind(self, mix: str, taken: Sequence[int]) -> int:
        """Return the feed that is furthest behind its share of the tokens that a split has taken."""
        return min(range(len(taken)), key=lambda feed: taken[feed] / self._mixes[mix][feed].weight)

    def _count(self, plan: SplitPlan, part: _Part) -> None:
        self.tokens[plan.name] += len(part.tokens)
        self.documents[plan.name] += part.is_first
        self.documents_of[plan.mix, part.source] += part.is_first
        self.tokens_of[plan.mix, part.source] += len(part.tokens)

    def _tokenised(self, feed: Feed) -> Iterator[TokenisedDocument]:
        """Yield tokenised documents of a feed in the order of packing, with repeats taken out."""
        for window in _windows(feed.documents):
            window.sort(key=lambda document: order_key(self._seed, document.content))
            admitted = filter(None, map(self._repeats.admit, window))
            for batch in _batches(admitted, _DOCUMENTS_PER_BATCH):
                for document, ids in zip(batch, self._encode(batch), strict=True):
                    if ids is not None:
                        yield TokenisedDocument(document, np.array([*ids, self._separator], np.int32))

    def _shortage(self, plan: SplitPlan, feed: int) -> str:
        """Say what a mix was asked for and what was found, where a feed of it ends."""
        mix, plans = self._mixes[plan.mix], [other for other in self._plans.values() if other.mix == plan.mix]
        lines = [f"{other.name} {self.tokens[other.name]:,} of {other.tokens:,}" for other in plans]
        share = "" if len(mix) == 1 else " (its weight asks for more than it has)"
        num_unused = self._unused[plan.mix]
        unused = f"{num_unused:,} tokens are the rest of documents that held-out splits began; " if num_unused else ""
        return (
            f"the {plan.mix} corpus needs {sum(other.tokens for other in plans):,} tokens, and the source "
            f"{mix[feed].name} ends before{share}. Found: {', '.join(lines)}; {unused}"
            f"{self.left_out:,} documents were left out because they repeat others. "
            f"Lower {', '.join(other.key for other in plans)}, or change the sources or their weights"
        )


class _HeldOutFeed:
    """A feed as a held-out split takes it: the beginnings of documents, then what follows in the same documents."""

    def __init__(self, stream: Iterator[TokenisedDocument], every: int, seq_len: int) -> None:
        self._seq_len = seq_len
        self._documents = self._taken(stream, every)
        self._rests: deque[tuple[int, Source, Tokens]] = deque()
        self.between: list[TokenisedDocument] = []
        self.unused = 0

    def _taken(self, stream: Iterator[TokenisedDocument], every: int) -> Iterator[TokenisedDocument]:
        for index, tokenised in enumerate(stream):
            if index % every == 0:
                yield tokenised
            else:
                self.between.append(tokenised)

    def next_sequence(self, number: int) -> tuple[int, list[_Part]] | None:
        """Return the next sequence: a document's beginning, and other documents behind it where it is short.

        Args:
            number: the number of the sequence's first document, if it was not begun before.

        Returns:
            The number of the sequence's first document and the sequence's parts; None at the end of the feed.
        """
        parts: list[_Part] = []
        num_missing = self._seq_len
        while num_missing:
            tokenised = next(self._documents, None)
            if tokenised is None:
                return self._next_of_rests()
            source, tokens = tokenised.document.source, tokenised.tokens
            parts.append(_Part(source, tokens[:num_missing], is_first=True))
            self._keep(number, source, tokens[num_missing:])
            num_missing -= len(parts[-1].tokens)
        return number, parts

    def _next_of_rests(self) -> tuple[int, list[_Part]] | None:
        """Take the next tokens of the document that waits longest."""
        if not self._rests:
            return None
        number, source, tokens = self._rests.popleft()
        self.unused -= len(tokens)
        self._keep(number, source, tokens[self._seq_len :])
        return number, [_Part(source, tokens[: self._seq_len], is_first=False)]

    def _keep(self, number: int, source: Source, rest: Tokens) -> None:
        """Keep what follows in a document, if it is enough for a sequence."""
        self.unused += len(rest)
        if len(rest) >= self._seq_len:
            self._rests.append((number, source, rest))


def _windows(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in lists of about WINDOW_CHARS."""
    window: list[Document] = []
    length = 0
    for document in documents:
        window.append(document)
        length += len(document.content)
        if length >= WINDOW_CHARS:
            yield window
            window, length = [], 0
    yield window


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
