"""Long documents for the log-loss by position: of a file that params name, or of the corpus's validation split."""

import heapq
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from storage.accuracy_sections import PositionLoss
from storage.corpus import read_documents, read_sequences
from storage.documents import Source
from storage.files import InputError
from storage.paths import Paths
from storage.remote import fetch
from storage.text_datasets import Columns, SkippedRows, file_documents, file_kind

_USED_BY = "measure_accuracy.position_loss"


@dataclass(frozen=True)
class LongDocuments:
    """Token ids of documents, and the numbers by which errors are clustered."""

    tokens: list[list[int]]
    numbers: list[int]


def long_documents(
    settings: PositionLoss, tokenizer: PreTrainedTokenizerBase, context: int, paths: Paths
) -> LongDocuments:
    """Read the documents, cut to the parent's context.

    Raises:
        InputError: they cannot be read, or `tokens` is longer than the context.
    """
    longest = settings.tokens or context
    if longest > context:
        raise InputError(f"{_USED_BY}.tokens is {longest}, more than the parent's context of {context}")
    if settings.path is None:
        split = "validation"
        sequences = read_sequences(paths.corpus, split)[: settings.documents, :longest]
        return LongDocuments(sequences.tolist(), read_documents(paths.corpus, split)[: len(sequences)].tolist())
    texts = heapq.nlargest(settings.documents, _texts(settings.path, settings.text), key=len)
    tokens = [tokenizer(text)["input_ids"][:longest] for text in texts]
    tokens = [ids for ids in tokens if len(ids) > 1]
    if not tokens:
        raise InputError(f"{settings.path} has no text; {_USED_BY} needs some")
    return LongDocuments(tokens, list(range(len(tokens))))


def _texts(path: str, column: str) -> list[str]:
    """Read the texts of a file's rows; a .txt is one, whose paragraphs stay apart by an empty line."""
    with tempfile.TemporaryDirectory() as scratch:
        file = fetch(path, Path(scratch))
        source, skipped = Source(file.name, "", ""), SkippedRows(path)
        texts = [document.text for document in file_documents(file, path, source, Columns(column), skipped)]
    skipped.check()
    return ["\n\n".join(texts)] if file_kind(file.name) == ".txt" else texts
