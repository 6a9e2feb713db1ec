"""Taking out repeats: a document goes in; it comes out without the paragraphs of earlier documents, or not at all.

A *paragraph* is a run of lines between blank lines; a line longer than LONG_CHARS is a paragraph by itself, as in text
that is not wrapped. A paragraph longer than LONG_CHARS enters the corpus once, in the split that is filled first; so a
longer train split changes nothing in the other two.
"""

import hashlib
import re
from dataclasses import replace

from storage.documents import Document

LONG_CHARS = 80
"""Paragraphs longer than this may occur once; shorter ones are headings and phrases that no text can avoid."""

_BLANK_LINE = re.compile(r"^[^\S\n]+$", re.M)


def paragraphs(text: str) -> list[str]:
    """List the paragraphs of a text, without the blank lines between them."""
    groups: list[list[str]] = [[]]
    for line in text.split("\n"):
        if not line.strip():
            groups.append([])
        elif len(line) > LONG_CHARS:
            groups += [[line], []]
        else:
            groups[-1].append(line)
    return ["\n".join(lines) for lines in groups if lines]


class Repeats:
    """Remembers what entered the corpus, and takes out of later documents what repeats it.

    8 bytes of hash stand for a paragraph: among 10^8 of them two would collide with a probability of 0.03 %, and
    then a paragraph is missing.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.left_out = 0

    def admit(self, document: Document) -> Document | None:
        """Return the document without long paragraphs that the corpus has already.

        Returns:
            None where more than half of its text is gone, where the rest equals an earlier document, and for a chat
            of which a turn repeats: a chat with holes is no chat. (A repeated system prompt is taken out of its chat.)
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
        new_paragraphs = self._new_paragraphs(text)
        if sum(map(len, new_paragraphs)) * 2 < sum(map(len, paragraphs(text))) or not new_paragraphs:
            return None
        return replace(document, text=text if new_paragraphs == paragraphs(text) else "\n\n".join(new_paragraphs))

    def _without_repeated_turns(self, chat: Document) -> Document | None:
        turns = []
        for turn in chat.messages:
            if turn.role == "system":
                turn = replace(turn, content="\n\n".join(self._new_paragraphs(turn.content)))
            if turn.content or turn.role != "system":
                turns.append(turn)
        chat = replace(chat, messages=tuple(turns))
        hashes = self._long(chat.content)
        repeated = len(set(hashes)) < len(hashes) or not self._seen.isdisjoint(hashes)
        return None if repeated or not chat.content.strip() else chat

    def _new_paragraphs(self, text: str) -> list[str]:
        """List paragraphs that are short, or neither in the corpus nor earlier in this text."""
        seen_in_text: set[int] = set()
        new_paragraphs = []
        for paragraph in paragraphs(text):
            digest = self._hash(paragraph)
            if len(paragraph) <= LONG_CHARS or not (digest in self._seen or digest in seen_in_text):
                new_paragraphs.append(paragraph)
                seen_in_text.add(digest)
        return new_paragraphs

    def _long(self, text: str) -> list[int]:
        """Return the hashes of the long paragraphs of a text."""
        return [self._hash(paragraph) for paragraph in paragraphs(text) if len(paragraph) > LONG_CHARS]

    @staticmethod
    def _hash(text: str) -> int:
        """Return the hash of a paragraph; paragraphs that differ only in white space have the same."""
        words = " ".join(text.split()).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
