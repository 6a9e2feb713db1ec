"""Packing: splits share nothing, budgets and weights are met, the same seed gives the same sequences."""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import pytest

from storage.documents import Document, Source
from storage.files import InputError
from tasks.puzzle.corpus.packing import Feed, Packer
from tests.puzzle.corpus.test_repeats import SOURCE, long_blocks, plain

SEPARATOR = 0
ORDER = ("validation", "calibration", "train")


def characters(documents: Sequence[Document]) -> list[list[int]]:
    """A tokenizer whose tokens are characters."""
    return [[ord(character) for character in document.content] for document in documents]


def prose(name: str, count: int = 3) -> str:
    """Long paragraphs that no other name has."""
    return "\n\n".join(f"Paragraph {index} of {name}: " + f"{name} {index} " * 12 for index in range(count))


def packed(packer: Packer) -> dict[str, np.ndarray]:
    return {split: np.array(list(packer.sequences(split)), np.int32) for split in ORDER}


def pack(feeds: Sequence[Feed], budgets: Sequence[int], seq_len: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    budget = dict(zip(ORDER, budgets, strict=True))
    return packed(Packer(feeds, budget, seq_len, characters, SEPARATOR, seed))


def texts_of(sequences: np.ndarray) -> list[str]:
    """The documents of a split, read back from its tokens."""
    text = "".join(map(chr, sequences.ravel()))
    return [document for document in text.split(chr(SEPARATOR)) if document]


def test_budgets_are_met_exactly_and_the_stream_is_the_documents() -> None:
    documents = plain(prose(f"document {index}") for index in range(40))
    result = pack([Feed("f", 1.0, documents)], (320, 160, 960))
    assert {split: array.shape for split, array in result.items()} == {
        "validation": (20, 16),
        "calibration": (10, 16),
        "train": (60, 16),
    }
    wholes = {document.text for document in documents}
    for array in result.values():
        *whole, cut = texts_of(array)
        assert set(whole) <= wholes
        assert any(text.startswith(cut) for text in wholes)


def test_the_same_seed_gives_the_same_tokens_in_any_order_of_reading() -> None:
    documents = plain(prose(f"document {index}") for index in range(40))
    first = pack([Feed("f", 1.0, documents)], (320, 160, 960))
    again = pack([Feed("f", 1.0, documents[::-1])], (320, 160, 960))
    other = pack([Feed("f", 1.0, documents)], (320, 160, 960), seed=1)
    for split in ORDER:
        np.testing.assert_array_equal(first[split], again[split])
    assert not np.array_equal(first["validation"], other["validation"])


def test_a_longer_train_split_leaves_the_others_as_they_are() -> None:
    documents = plain(prose(f"document {index}") for index in range(40))
    short, longer = (pack([Feed("f", 1.0, documents)], (320, 160, train)) for train in (160, 1600))
    np.testing.assert_array_equal(short["validation"], longer["validation"])
    np.testing.assert_array_equal(short["calibration"], longer["calibration"])
    np.testing.assert_array_equal(short["train"], longer["train"][:10])


def test_splits_share_nothing_where_documents_repeat_paragraphs() -> None:
    shared = [f"This paragraph {index} stands in many documents, " + "word " * 20 for index in range(5)]
    texts = [f"{prose(f'document {index}', 2)}\n\n{shared[index % 5]}\n\nshort" for index in range(60)]
    result = pack([Feed("f", 1.0, plain(texts + texts))], (1600, 1600, 4800))
    blocks = {split: set(chain(*map(long_blocks, texts_of(array)))) for split, array in result.items()}
    documents = {split: set(texts_of(array)) for split, array in result.items()}
    for a, b in (("train", "validation"), ("train", "calibration"), ("calibration", "validation")):
        assert not blocks[a] & blocks[b]
        assert not documents[a] & documents[b]
    counted = " ".join(" ".join(texts_of(array)) for array in result.values())
    assert {counted.count(paragraph.strip()) for paragraph in shared} <= {0, 1}
    assert any(paragraph.strip() in counted for paragraph in shared)


def test_weights_are_met_in_every_split() -> None:
    sources = [Source(name, "1", "MIT") for name in ("a", "b")]
    feeds = [
        Feed(source.name, weight, plain((prose(f"{source.name}{index}") for index in range(200)), source))
        for source, weight in zip(sources, (3.0, 1.0), strict=True)
    ]
    budgets = {"validation": 8_000, "calibration": 4_000, "train": 16_000}
    packer = Packer(feeds, budgets, 16, characters, SEPARATOR, 0)
    longest = max(len(document.content) + 1 for feed in feeds for document in feed.documents)
    before = 0
    for split, budget in budgets.items():
        list(packer.sequences(split))
        share = packer.tokens_of[sources[0]] - before
        before = packer.tokens_of[sources[0]]
        assert abs(share - 0.75 * budget) <= longest, "shares are exact to a document"
    assert sum(packer.tokens_of.values()) == sum(budgets.values())
    assert packer.documents_of.total() == packer.documents.total()


def test_too_little_text_says_what_was_found() -> None:
    with pytest.raises(InputError) as caught:
        pack([Feed("tiny.txt", 1.0, plain([prose("only")]))], (160, 160, 160))
    message = str(caught.value)
    assert "needs 480 tokens" in message
    assert "source tiny.txt ends" in message
    assert "validation 160 of 160, calibration 0 of 160, train 0 of 160" in message


def test_a_source_that_cannot_hold_its_weight_is_named() -> None:
    feeds = [
        Feed("large", 1.0, plain(prose(f"large {index}") for index in range(50))),
        Feed("small", 1.0, plain([prose("small")])),
    ]
    with pytest.raises(InputError, match=r"source small ends before \(its weight asks for more"):
        pack(feeds, (1600, 1600, 1600))


def test_no_documents_at_all() -> None:
    with pytest.raises(InputError, match="validation 0 of 16"):
        pack([Feed("empty", 1.0, [])], (16, 16, 16))


def test_no_more_is_read_than_is_needed() -> None:
    def endless() -> Iterable[Document]:
        index = 0
        while True:
            yield Document(prose(f"number {index}", 400), SOURCE, "#")
            index += 1

    result = pack([Feed("stream", 1.0, endless())], (160, 160, 160))
    assert all(array.shape == (10, 16) for array in result.values())
