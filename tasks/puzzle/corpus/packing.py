"""Packing: documents go in; token sequences of three splits come out, which share no document and no long paragraph.

Documents are put in an order that depends on nothing but their text and the seed (within windows of WINDOW_CHARS, so
that a huge source is not read to its end), and fill one split after the other: validation, calibration, train in this
project. What repeats an earlier document is taken out on the way (tasks/puzzle/corpus/repeats.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from storage.documents import Document, Source, order_key
from storage.files import InputError
from tasks.puzzle.corpus.repeats import Repeats

WINDOW_CHARS = 1 << 20
"""Documents are shuffled within windows of this much text (about a quarter of a million tokens)."""

_DOCUMENTS_PER_BATCH = 64

Tokens = NDArray[np.int32]
Encode = Callable[[Sequence[Document]], Sequence[list[int] | None]]
"""Gives the token ids of each document, without separator; it applies the chat template. None: it is left out."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Feed:
    """A stream of documents, and the weight of its share of the tokens among the feeds."""

    name: str
    weight: float
    documents: Iterable[Document]


@dataclass(frozen=True)
class TokenisedDocument:
    """A document's tokens with the separator, int32 [tokens]."""

    document: Document
    tokens: Tokens


class Packer:
    """Fills the splits one after the other from the same feeds, and counts documents and tokens by split and source."""

    def __init__(
        self,
        feeds: Sequence[Feed],
        budgets: Mapping[str, int],
        seq_len: int,
        encode: Encode,
        separator: int,
        seed: int,
    ) -> None:
        """Prepare the streams; nothing is read yet.

        Args:
            feeds: the ingredients.
            budgets: tokens per split, multiples of `seq_len`, in the order in which the splits will be taken.
            seq_len: tokens per sequence.
            encode: tokenizer of documents.
            separator: token id after each document.
            seed: orders the documents.
        """
        assert all(tokens % seq_len == 0 for tokens in budgets.values()), (budgets, seq_len)
        self._feeds = tuple(feeds)
        self._budgets = dict(budgets)
        self._seq_len = seq_len
        self._encode = encode
        self._separator = separator
        self._seed = seed
        self._repeats = Repeats()
        self._streams = [self._tokenised(feed) for feed in self._feeds]
        self.tokens = dict.fromkeys(budgets, 0)
        self.documents: Counter[str] = Counter()
        self.documents_of: Counter[Source] = Counter()
        self.tokens_of: Counter[Source] = Counter()

    @property
    def left_out(self) -> int:
        """Documents left out so far because they repeat others."""
        return self._repeats.left_out

    def sequences(self, split: str) -> Iterator[Tokens]:
        """Sequences of a split, int32 [seq_len], to its budget; to be exhausted before the next split begins.

        Raises:
            InputError: the feeds do not hold enough tokens, the message has how many each split got.
        """
        row, used = np.empty(self._seq_len, np.int32), 0
        for tokens in self._take(split):
            start = 0
            while start < len(tokens):
                count = min(self._seq_len - used, len(tokens) - start)
                row[used : used + count] = tokens[start : start + count]
                start, used = start + count, used + count
                if used == self._seq_len:
                    yield row
                    row, used = np.empty(self._seq_len, np.int32), 0

    def _take(self, split: str) -> Iterator[Tokens]:
        """Tokens of documents, the next always from the feed that is furthest behind its share; the last one is cut."""
        budget = self._budgets[split]
        taken = [0] * len(self._feeds)
        with tqdm(total=budget, unit=" tokens", unit_scale=True, desc=f"pack {split}", disable=None) as progress:
            while self.tokens[split] < budget:
                feed = min(range(len(taken)), key=lambda index: taken[index] / self._feeds[index].weight)
                tokenised = next(self._streams[feed], None)
                if tokenised is None:
                    raise InputError(self._shortage(self._feeds[feed].name))
                tokens = tokenised.tokens[: budget - self.tokens[split]]
                taken[feed] += len(tokens)
                self.tokens[split] += len(tokens)
                self.documents[split] += 1
                self.documents_of[tokenised.document.source] += 1
                self.tokens_of[tokenised.document.source] += len(tokens)
                progress.update(len(tokens))
                yield tokens

    def _tokenised(self, feed: Feed) -> Iterator[TokenisedDocument]:
        """Tokenised documents of a feed in the order of packing, with repeats taken out."""
        for window in _windows(feed.documents):
            window.sort(key=lambda document: order_key(self._seed, document.content))
            admitted = filter(None, map(self._repeats.admit, window))
            for batch in _batches(admitted, _DOCUMENTS_PER_BATCH):
                for document, ids in zip(batch, self._encode(batch), strict=True):
                    if ids is not None:
                        yield TokenisedDocument(document, np.array([*ids, self._separator], np.int32))

    def _shortage(self, name: str) -> str:
        lines = [f"{split} {self.tokens[split]:,} of {self._budgets[split]:,}" for split in self._budgets]
        total = sum(self._budgets.values())
        share = "" if len(self._feeds) == 1 else " (its weight asks for more than it has)"
        return (
            f"the corpus needs {total:,} tokens, and the source {name} ends before{share}. Found: {', '.join(lines)}; "
            f"{self.left_out:,} documents were left out because they repeat others. "
            "Lower the token budgets of prepare_corpus, or change its sources or their weights"
        )


def _windows(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about WINDOW_CHARS."""
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
