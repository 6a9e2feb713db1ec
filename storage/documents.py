"""Documents of a corpus: plain texts and chats with their source, cut into pages, in an order that a seed decides.

Readers make them (storage/embedded_corpus.py, storage/text_datasets.py); tasks/puzzle/corpus packs them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
PAGE_CHARS = 3_000
"""A page ends before the paragraph that would carry it beyond this (about 800 tokens): small, so that even the 2,000
tokens that a score is measured on come from several documents."""

TRAINING_MIX = "training"
"""The name of the text that children are trained on, beside the held-out domains."""


@dataclass(frozen=True, order=True)
class Source:
    """The origin of a document, by the name that the manifest gives it."""

    name: str
    version: str
    licence: str


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `fields` is JSON of what a template may read besides (storage/chats.py)."""

    role: str
    content: str
    fields: str = ""

    @property
    def for_template(self) -> dict[str, Any]:
        """Return the message in the form that chat templates take."""
        return {"role": self.role, "content": self.content, **(json.loads(self.fields) if self.fields else {})}

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """Return the functions that it calls: each a mapping of `name` and `arguments`."""
        return [call["function"] for call in self.for_template.get("tool_calls", ())]

    @property
    def text(self) -> str:
        """Return all that it says: its content, and the tool calls behind it."""
        calls = (json.dumps(call, ensure_ascii=False) for call in self.tool_calls)
        return "\n".join([*filter(None, (self.content,)), *calls])


@dataclass(frozen=True)
class Document:
    """One document: plain `text`, or a chat (`messages`; `text` is then empty until the template renders them)."""

    text: str
    source: Source
    path: str
    messages: tuple[Message, ...] = ()

    @property
    def content(self) -> str:
        """Return all its text, without the marks of a chat template."""
        return self.text or "\n\n".join(message.text for message in self.messages)


@dataclass(frozen=True)
class PackedSequence:
    """A sequence: its tokens, int32 [seq_len], and the number, within its split, of the document that begins it.

    In splits other than train, sequences that share a document have the same number.
    """

    tokens: Tokens
    document: int


def pages(paragraphs: Iterable[str]) -> Iterator[str]:
    """Group paragraphs into texts of about PAGE_CHARS, cut only between paragraphs; empty paragraphs are dropped."""
    page: list[str] = []
    length = 0
    for paragraph in paragraphs:
        text = paragraph.strip("\n")
        if not text.strip():
            continue
        if page and length + len(text) > PAGE_CHARS:
            yield "\n\n".join(page)
            page, length = [], 0
        page.append(text)
        length += len(text) + 2
    if page:
        yield "\n\n".join(page)


def order_key(seed: int, name: str) -> bytes:
    """Return the sorting key of an order that looks random and depends on nothing but the name and the seed."""
    salt = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16, salt=salt).digest()
