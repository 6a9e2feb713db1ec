"""Packing: splits share nothing, budgets and weights are met, the same seed gives the same sequences."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.documents import Document, Source
from storage.files import InputError
from tasks.puzzle.corpus.packing import Encode, Feed, Packer, SplitPlan
from tests.puzzle.corpus.test_repeats import SOURCE, long_blocks, plain

SEPARATOR = 0
EVERY = {"validation": 4, "calibration": 3, "train": None}
LONGEST = 1_000


def characters(documents: Sequence[Document]) -> list[list[int]]:
    """Tokenize to characters."""
    return [[ord(character) for character in document.content] for document in documents]


def positions(documents: Sequence[Document]) -> list[list[int]]:
    """Tokenize to tokens that say of which document they are, and where in it."""
    facts = [[int(word) for word in document.text.split()] for document in documents]
    return [[LONGEST * (1 + index) + position for position in range(length)] for index, length in facts]


def numbered(lengths: Iterable[int]) -> list[Document]:
    """Return documents for `positions`."""
    return plain(f"{index} {length}" for index, length in enumerate(lengths))


def prose(name: str, count: int = 3) -> str:
    """Return long paragraphs that no other name has."""
    return "\n\n".join(f"Paragraph {index} of {name}: " + f"{name} {index} " * 12 for index in range(count))


def plans(budgets: Sequence[int]) -> list[SplitPlan]:
    splits = zip(EVERY.items(), budgets, strict=True)
    return [SplitPlan(name, "training", tokens, every, f"{name}_tokens") for (name, every), tokens in splits]


def packer(
    feeds: Sequence[Feed], budgets: Sequence[int], seq_len: int = 16, seed: int = 0, encode: Encode = characters
) -> Packer:
    return Packer({"training": feeds}, plans(budgets), seq_len, encode, SEPARATOR, seed)


class Packed:
    """The splits of a packer: tokens and document numbers."""

    def __init__(self, source: Packer, splits: Iterable[str] = EVERY) -> None:
        sequences = {split: list(source.sequences(split)) for split in splits}
        self.tokens = {split: np.array([row.tokens for row in rows], np.int32) for split, rows in sequences.items()}
        self.documents = {split: [row.document for row in rows] for split, rows in sequences.items()}

    def texts(self, split: str) -> list[str]:
        """Return the documents of a split, as far as they were packed, read back from its tokens."""
        rows = self.tokens[split].reshape(1, -1) if split == "train" else self.tokens[split]
        return [text for row in rows for text in "".join(map(chr, row)).split(chr(SEPARATOR)) if text]


def test_budgets_are_met_exactly_and_the_stream_is_the_documents() -> None:
    documents = plain(prose(f"document {index}") for index in range(100))
    packed = Packed(packer([Feed("f", 1.0, documents)], (320, 160, 960)))
    assert {split: array.shape for split, array in packed.tokens.items()} == {
        "validation": (20, 16),
        "calibration": (10, 16),
        "train": (60, 16),
    }
    wholes = {document.text for document in documents}
    *whole, cut = packed.texts("train")
    assert set(whole) <= wholes
    assert any(text.startswith(cut) for text in wholes)
    for split in ("validation", "calibration"):
        assert set(packed.texts(split)) <= {text[:16] for text in wholes}
        assert packed.documents[split] == list(range(len(packed.documents[split])))


def test_the_same_seed_gives_the_same_tokens_in_any_order_of_reading() -> None:
    documents = plain(prose(f"document {index}") for index in range(40))
    first = Packed(packer([Feed("f", 1.0, documents)], (320, 160, 960)))
    again = Packed(packer([Feed("f", 1.0, documents[::-1])], (320, 160, 960)))
    another_seed = Packed(packer([Feed("f", 1.0, documents)], (320, 160, 960), seed=1))
    for split in EVERY:
        np.testing.assert_array_equal(first.tokens[split], again.tokens[split])
        assert first.documents[split] == again.documents[split]
    assert not np.array_equal(first.tokens["validation"], another_seed.tokens["validation"])


def test_a_longer_split_leaves_those_before_it_as_they_are() -> None:
    documents = plain(prose(f"document {index}") for index in range(40))
    short = Packed(packer([Feed("f", 1.0, documents)], (320, 160, 160)))
    longer = Packed(packer([Feed("f", 1.0, documents)], (320, 160, 1600)))
    np.testing.assert_array_equal(short.tokens["validation"], longer.tokens["validation"])
    np.testing.assert_array_equal(short.tokens["calibration"], longer.tokens["calibration"])
    np.testing.assert_array_equal(short.tokens["train"], longer.tokens["train"][:10])
    calibrated = Packed(packer([Feed("f", 1.0, documents)], (320, 320, 160)))
    np.testing.assert_array_equal(short.tokens["validation"], calibrated.tokens["validation"])


def test_splits_share_nothing_where_documents_repeat_paragraphs() -> None:
    shared = [f"This paragraph {index} stands in many documents, " + "word " * 20 for index in range(5)]
    texts = [f"{prose(f'document {index}', 2)}\n\n{shared[index % 5]}\n\nshort" for index in range(60)]
    packed = Packed(packer([Feed("f", 1.0, plain(texts + texts))], (1600, 1600, 4800), seq_len=400))
    blocks = {split: set(chain(*map(long_blocks, packed.texts(split)))) for split in EVERY}
    documents = {split: set(packed.texts(split)) for split in EVERY}
    for a, b in (("train", "validation"), ("train", "calibration"), ("calibration", "validation")):
        assert not blocks[a] & blocks[b]
        assert not documents[a] & documents[b]
    counted = " ".join(chain(*map(packed.texts, EVERY)))
    assert {counted.count(paragraph.strip()) for paragraph in shared} <= {0, 1}
    assert any(paragraph.strip() in counted for paragraph in shared)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 20), max_size=12),
    st.integers(0, 24).map(lambda sequences: 16 * sequences),
    st.integers(0, 24).map(lambda sequences: 16 * sequences),
)
def test_held_out_sequences_are_beginnings_of_documents_as_far_as_they_go(
    short: list[int], validation: int, calibration: int
) -> None:
    feed = Feed("f", 1.0, numbered([*short, *[60] * 60]))
    packed = Packed(packer([feed], (validation, calibration, 32), encode=positions))
    inside = {split: [set((row[row > 0] // LONGEST).tolist()) for row in rows] for split, rows in packed.tokens.items()}
    documents = [set(chain(*inside[split])) for split in EVERY]
    assert len(set.union(*documents)) == sum(map(len, documents)), "no document is in two splits"
    for split in ("validation", "calibration"):
        numbers, goes_on = packed.documents[split], False
        for index, row in enumerate(packed.tokens[split]):
            begins = row[0] == SEPARATOR or row[0] % LONGEST == 0
            goes_on |= not begins
            assert begins != goes_on, "documents are taken up again only when there is no other"
            gaps = np.flatnonzero(row == SEPARATOR)[:-1] + 1
            assert all(row[gap] == SEPARATOR or row[gap] % LONGEST == 0 for gap in gaps if gap < len(row))
            for other in range(index):
                if inside[split][index] & inside[split][other]:
                    assert numbers[index] == numbers[other]


def test_a_source_of_a_dozen_long_documents_fills_all_splits() -> None:
    documents = numbered([400] * 12)
    source = packer([Feed("f", 1.0, documents)], (160, 160, 1600), encode=positions)
    packed = Packed(source)
    assert packed.documents["validation"] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], "every fourth, each from its beginning"
    assert packed.documents["calibration"] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert (packed.tokens["validation"][[0, 3, 6, 9], 0] % LONGEST).tolist() == [0, 16, 32, 48]
    assert source.documents == {"validation": 3, "calibration": 3, "train": 4}
    assert packed.documents["train"] == sorted(packed.documents["train"])
    firsts = zip(packed.documents["train"], packed.tokens["train"][:, 0], strict=True)
    pairs = {(number, int(token) // LONGEST) for number, token in firsts if token != SEPARATOR}
    assert len(pairs) == 4, "a train sequence has the number of the document of its first token"


def test_a_held_out_document_is_used_to_its_last_sequence() -> None:
    packed = Packed(packer([Feed("f", 1.0, numbered([31]))], (32, 0, 0), encode=positions))  # 32 with the separator
    assert packed.documents["validation"] == [0, 0]


def test_domains_are_filled_first_and_share_no_document_with_the_training_mix() -> None:
    documents = plain(prose(f"document {index}") for index in range(60))
    domain_documents = plain((prose(f"other {index}") for index in range(30)), Source("other", "1", "MIT"))

    def pack(train: int, training: list[Document]) -> tuple[Packer, Packed]:
        mixes = {"prose": [Feed("p", 1.0, domain_documents)], "training": [Feed("f", 1.0, training)]}
        domain = SplitPlan("domain_prose", "prose", 320, 1, "domains.prose.tokens")
        source = Packer(mixes, [domain, *plans((160, 160, train))], 16, characters, SEPARATOR, 0)
        return source, Packed(source, ("domain_prose", *EVERY))

    source, packed = pack(320, documents)
    assert packed.documents["domain_prose"] == list(range(20)), "every document, one sequence each"
    assert set(packed.texts("domain_prose")) <= {document.text[:16] for document in domain_documents}
    assert {mix for mix, _ in source.tokens_of} == {"prose", "training"}
    longer, with_copies = pack(3_200, domain_documents + documents)
    np.testing.assert_array_equal(packed.tokens["domain_prose"], with_copies.tokens["domain_prose"])
    assert longer.left_out >= 20, "documents of the domain are no training text"
    domain_documents[:] = plain(["a text of fifteen", "another of them"])
    with pytest.raises(InputError, match=r"the prose corpus needs 320 .*domain_prose 32 of 320; .*Lower domains\.pro"):
        pack(320, documents)


def weighted(sizes: Mapping[str, float]) -> tuple[list[Source], list[Feed]]:
    """Return a feed of 200 documents for each name."""
    sources = [Source(name, "1", "MIT") for name in sizes]
    feeds = [
        Feed(source.name, sizes[source.name], plain((prose(f"{source.name}{i}") for i in range(200)), source))
        for source in sources
    ]
    return sources, feeds


def test_weights_are_met_in_every_split() -> None:
    budgets = {"validation": 320, "calibration": 160, "train": 16_000}
    sources, feeds = weighted({"a": 3.0, "b": 1.0})
    mixed = packer(feeds, list(budgets.values()))
    longest = max(len(document.content) + 1 for feed in feeds for document in feed.documents)
    before = 0
    for split, budget in budgets.items():
        list(mixed.sequences(split))
        share = mixed.tokens_of["training", sources[0]] - before
        before = mixed.tokens_of["training", sources[0]]
        exact_to = longest if split == "train" else 16
        assert abs(share - 0.75 * budget) <= exact_to, "shares are exact to a document, or to a held-out sequence"
    assert sum(mixed.tokens_of.values()) == sum(budgets.values())
    assert mixed.documents_of.total() == mixed.documents.total()


def test_too_little_text_says_what_was_found() -> None:
    with pytest.raises(InputError) as caught:
        Packed(packer([Feed("tiny.txt", 1.0, plain([prose("only")]))], (160, 160, 160)))
    message = str(caught.value)
    assert "the training corpus needs 480 tokens" in message
    assert "source tiny.txt ends" in message
    assert "validation 160 of 160, calibration 0 of 160, train 0 of 160" in message
    assert f"{len(prose('only')) + 1 - 160} tokens are the rest of documents that held-out splits began" in message
    assert "Lower validation_tokens, calibration_tokens, train_tokens, or" in message


def test_a_source_that_cannot_hold_its_weight_is_named() -> None:
    feeds = [
        Feed("large", 1.0, plain(prose(f"large {index}") for index in range(50))),
        Feed("small", 1.0, plain([prose("small")])),
    ]
    with pytest.raises(InputError, match=r"source small ends before \(its weight asks for more"):
        Packed(packer(feeds, (1600, 1600, 1600)))


def test_no_documents_at_all() -> None:
    with pytest.raises(InputError, match="validation 0 of 16"):
        Packed(packer([Feed("empty", 1.0, [])], (16, 16, 16)))


def test_no_more_is_read_than_is_needed() -> None:
    def endless() -> Iterable[Document]:
        index = 0
        while True:
            yield Document(prose(f"number {index}", 400), SOURCE, "#")
            index += 1

    packed = Packed(packer([Feed("stream", 1.0, endless())], (32, 32, 160)))
    assert [len(rows) for rows in packed.tokens.values()] == [2, 2, 10]
