"""Repeats: paragraphs by hand, what is taken out of a document, and when a whole document is left out."""

import re
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from storage.documents import Document, Message, Source
from tasks.puzzle.corpus.repeats import LONG_CHARS, Repeats, paragraphs

SOURCE = Source("here", "1", "MIT")


def plain(texts: Iterable[str], source: Source = SOURCE) -> list[Document]:
    return [Document(text, source, f"#{index}") for index, text in enumerate(texts)]


def chat(*contents: str, system: str = "") -> Document:
    turns = [Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(contents)]
    return Document("", SOURCE, "#", tuple(([Message("system", system)] if system else []) + turns))


def long_blocks(text: str) -> list[str]:
    """Return an outsider's paragraphs: what stands between blank lines, longer than 80 characters."""
    return [block for block in re.split(r"\n\s*\n", text) if len(block.strip()) > 80]


def test_paragraphs_by_hand() -> None:
    long = "x" * 81
    assert paragraphs("a\nb\n\n \n\nc") == ["a\nb", "c"]
    assert paragraphs(f"a\n{long}\nb\nc") == ["a", long, "b\nc"]
    assert paragraphs("\n\n") == []


PIECES = st.sampled_from(
    ["short", "two\nlines", "a\n \nb", "x" * 81, "y " * 45, "z" * 50 + "\n" + "w" * 50, "v" * 79, "u" * 60]
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.tuples(PIECES, st.sampled_from(["\n", "\n\n", "\n\n\n", " \n\t\n"])), max_size=6), max_size=30)
)
def test_no_long_paragraph_and_no_document_enters_twice(pieces: list[list[tuple[str, str]]]) -> None:
    repeats = Repeats()
    documents = plain("".join(map("".join, parts)) for parts in pieces)
    kept = [admitted.text for document in documents if (admitted := repeats.admit(document))]
    blocks = [" ".join(block.split()) for text in kept for block in long_blocks(text)]
    assert len(blocks) == len(set(blocks))
    lines = [line for text in kept for line in text.split("\n") if len(line) > LONG_CHARS]
    assert len(lines) == len(set(lines)), "text that is not wrapped has a paragraph per line"
    assert len(kept) == len(set(kept))
    assert repeats.left_out == len(documents) - len(kept)


def test_text_that_repeats_nothing_stays_as_it_is() -> None:
    text = "def f():\n    return 1\n\n\n" + "# " + "a comment " * 9 + "\n    x = 2\n\n\n\nend"
    admitted = Repeats().admit(Document(text, SOURCE, "#"))
    assert admitted is not None
    assert admitted.text == text


def test_a_document_that_loses_more_than_half_is_left_out() -> None:
    repeats = Repeats()
    common, unique = "common " * 20, "its own " * 15
    assert repeats.admit(Document(f"{common}\n\nfirst", SOURCE, "#"))
    assert repeats.admit(Document(f"{common}\n\n{unique}", SOURCE, "#")) is None
    assert repeats.admit(Document(f"{unique}\n\n{unique} more of it", SOURCE, "#")), "its paragraphs were not used up"
    assert repeats.left_out == 1


def test_a_chat_with_a_repeated_turn_is_left_out_and_a_repeated_system_prompt_is_taken_out() -> None:
    repeats = Repeats()
    system, long = "You are a helpful assistant. " * 5, "The same answer again. " * 6
    first = repeats.admit(chat("one", long, system=system))
    assert first is not None
    assert first.messages[0].role == "system"
    assert repeats.admit(chat("two", long)) is None
    second = repeats.admit(chat("three", "another", system=system))
    assert second is not None
    assert [turn.role for turn in second.messages] == ["user", "assistant"]
    assert repeats.admit(chat("three", "another")) is None, "the same chat without its system prompt"
    assert repeats.admit(chat(long * 2, long * 2)) is None, "a chat that repeats itself"
