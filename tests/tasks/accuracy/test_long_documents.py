"""Documents for the log-loss by position: the longest of a file, cut to the parent's context, or the corpus's."""

import gzip
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from storage.accuracy_sections import PositionLoss
from storage.corpus import read_documents, read_sequences
from storage.files import InputError
from storage.paths import Paths
from tasks.accuracy.long_documents import long_documents
from tests.clone import tiny_parent
from tests.tiny import tiny_corpus


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("documents") / "parent"
    tiny_parent(folder)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def test_the_longest_of_a_file_are_taken_and_cut(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    texts = ["block " * count for count in (5, 40, 3, 20)]
    file.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    documents = long_documents(
        PositionLoss.model_validate({"path": str(file), "documents": 2}), tokenizer, 30, Paths(tmp_path)
    )
    whole = [tokenizer(text)["input_ids"] for text in (texts[1], texts[3])]
    assert documents.tokens == [ids[:30] for ids in whole]
    assert documents.numbers == [0, 1]
    (tmp_path / "book.txt").write_text("\n\n".join(["child " * 400] * 3), encoding="utf-8")
    (book,) = long_documents(
        PositionLoss.model_validate({"path": str(tmp_path / "book.txt")}), tokenizer, 900, Paths(tmp_path)
    ).tokens
    assert len(book) == 900, "a text file is one document, not pages"
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress((tmp_path / "book.txt").read_bytes()))
    packed = PositionLoss.model_validate({"path": str(tmp_path / "packed.txt.gz")})
    assert long_documents(packed, tokenizer, 900, Paths(tmp_path)).tokens == [book]


def test_the_corpus_gives_its_validation_split(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    tiny_corpus(paths.corpus, 160, 16)
    documents = long_documents(PositionLoss.model_validate({"documents": 3, "tokens": 10}), tokenizer, 128, paths)
    assert documents.tokens == read_sequences(paths.corpus, "validation")[:3, :10].tolist()
    assert documents.numbers == read_documents(paths.corpus, "validation")[:3].tolist()


def test_what_cannot_be_measured_is_one_sentence(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than the parent's context of 128"):
        long_documents(PositionLoss.model_validate({"tokens": 129}), tokenizer, 128, Paths(tmp_path))
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 9)
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    for name in ("latin.txt", "broken.txt.gz"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            long_documents(PositionLoss.model_validate({"path": str(tmp_path / name)}), tokenizer, 128, Paths(tmp_path))
    (tmp_path / "numbers.jsonl").write_text('{"text": 5}\n' * 3, encoding="utf-8")
    with pytest.raises(InputError, match="3 of 3 rows cannot be used"):
        long_documents(
            PositionLoss.model_validate({"path": str(tmp_path / "numbers.jsonl")}), tokenizer, 128, Paths(tmp_path)
        )
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="has no text"):
        long_documents(
            PositionLoss.model_validate({"path": str(tmp_path / "empty.txt")}), tokenizer, 128, Paths(tmp_path)
        )
