"""Packing: documents go in; token sequences of three splits come out, which share no document and no long paragraph.

Documents are put in an order that depends on nothing but their text and the seed (within windows of WINDOW_CHARS, so
that a huge source is not read to its end), and fill one split after the other: validation, calibration, train in this
project. A *paragraph* is a run of lines between blank lines; a line longer than LONG_CHARS is one by itself, as in
text that is not wrapped. A paragraph longer than LONG_CHARS enters the corpus once, in the split that is filled first;
so a longer train split changes nothing in the other two.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from storage.files import InputError
from tasks.puzzle.corpora import Document, Source, order_key

LONG_CHARS = 80
"""Paragraphs longer than this may occur once; shorter ones are headings and phrases that no text can avoid."""

WINDOW_CHARS = 1 << 20
"""Documents are shuffled within windows of this much text (about a quarter of a million tokens)."""

_DOCUMENTS_PER_BATCH = 64
_BLANK_LINE = re.compile(r"^[^\S\n]+$", re.M)

Tokens = NDArray[np.int32]
Encode = Callable[[Sequence[Document]], list[list[int]]]
"""Token ids of each document, without separator; the chat template is applied here."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Feed:
    """A stream of documents, and its share of the tokens relative to the other feeds."""

    name: str
    weight: float
    documents: Iterable[Document]


@dataclass(frozen=True)
class Piece:
    """A document's tokens with the separator, int32 [tokens]."""

    document: Document
    tokens: Tokens


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, without the blank lines between them."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if not line.strip():
            found.append([])
        elif len(line) > LONG_CHARS:
            found += [[line], []]
        else:
            found[-1].append(line)
    return ["\n".join(lines) for lines in found if lines]


class Repeats:
    """Remembers what entered the corpus, and takes out of later documents what repeats it.

    8 bytes of hash stand for a paragraph: among 10^8 of them two would collide with a probability of 0.03 %, and
    then a paragraph is missing.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.left_out = 0

    def admit(self, document: Document) -> Document | None:
        """The document without long paragraphs that the corpus has already.

        None where more than half of its text is gone, where nothing else is left than an earlier document, and for a
        chat one of whose turns repeats: a chat with holes is none. (A repeated system prompt leaves its chat.)
        """
        admitted = self._without_repeated_turns(document) if document.messages else self._without_repeats(document)
        whole = self._hash(f"document\n{admitted.content}") if admitted else 0
        if admitted is None or whole in self._seen:
            self.left_out += 1
            return None
        self._seen.update([whole, *self._long(admitted.content)])
        return admitted

    def _without_repeats(self, document: Document) -> Document | None:
        text = _BLANK_LINE.sub("", document.text.replace("\r\n", "\n")).strip("\n")
        kept = self._new_paragraphs(text)
        if sum(map(len, kept)) * 2 < sum(map(len, paragraphs(text))) or not kept:
            return None
        return replace(document, text=text if kept == paragraphs(text) else "\n\n".join(kept))

    def _without_repeated_turns(self, chat: Document) -> Document | None:
        turns = [
            replace(turn, content="\n\n".join(self._new_paragraphs(turn.content))) if turn.role == "system" else turn
            for turn in chat.messages
        ]
        chat = replace(chat, messages=tuple(turn for turn in turns if turn.content or turn.role != "system"))
        hashes = self._long(chat.content)
        repeated = len(set(hashes)) < len(hashes) or not self._seen.isdisjoint(hashes)
        return None if repeated or not chat.content.strip() else chat

    def _new_paragraphs(self, text: str) -> list[str]:
        """Paragraphs that are short, or neither in the corpus nor earlier in this text."""
        own: set[int] = set()
        kept = []
        for paragraph in paragraphs(text):
            digest = self._hash(paragraph)
            if len(paragraph) <= LONG_CHARS or not (digest in self._seen or digest in own):
                kept.append(paragraph)
                own.add(digest)
        return kept

    def _long(self, text: str) -> list[int]:
        return [self._hash(paragraph) for paragraph in paragraphs(text) if len(paragraph) > LONG_CHARS]

    @staticmethod
    def _hash(text: str) -> int:
        """Paragraphs that differ only in white space are one."""
        words = " ".join(text.split()).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


class Packer:
    """Fills the splits one after the other from the same feeds; remembers what it took."""

    def __init__(
        self,
        feeds: Sequence[Feed],
        budgets: Mapping[str, int],
        seq_len: int,
        encode: Encode,
        separator: int,
        seed: int,
    ) -> None:
        """Nothing is read yet.

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
        self._streams = [self._pieces(feed) for feed in self._feeds]
        self.found = dict.fromkeys(budgets, 0)
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
            InputError: the feeds do not hold enough tokens, with what was found for each split.
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
        """Tokens of documents, the next always from the feed that lags most behind its share; the last one is cut."""
        budget = self._budgets[split]
        taken = [0] * len(self._feeds)
        with tqdm(total=budget, unit=" tokens", unit_scale=True, desc=f"pack {split}", disable=None) as progress:
            while self.found[split] < budget:
                feed = min(range(len(taken)), key=lambda index: taken[index] / self._feeds[index].weight)
                piece = next(self._streams[feed], None)
                if piece is None:
                    raise InputError(self._shortage(self._feeds[feed].name))
                tokens = piece.tokens[: budget - self.found[split]]
                taken[feed] += len(tokens)
                self.found[split] += len(tokens)
                self.documents[split] += 1
                self.documents_of[piece.document.source] += 1
                self.tokens_of[piece.document.source] += len(tokens)
                progress.update(len(tokens))
                yield tokens

    def _pieces(self, feed: Feed) -> Iterator[Piece]:
        """Tokenised documents of a feed in the order of packing, with repeats taken out."""
        for window in _windows(feed.documents):
            window.sort(key=lambda document: order_key(self._seed, document.content))
            fresh = (admitted for document in window if (admitted := self._repeats.admit(document)))
            for batch in _batches(fresh, _DOCUMENTS_PER_BATCH):
                for document, ids in zip(batch, self._encode(batch), strict=True):
                    yield Piece(document, np.array([*ids, self._separator], np.int32))

    def _shortage(self, name: str) -> str:
        lines = [f"{split} {self.found[split]:,} of {self._budgets[split]:,}" for split in self._budgets]
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
