"""write_text: texts and chats that the parent itself writes, for the corpus -> artifacts/written/, a piece per batch.

In: the parent, and `prepare_corpus.sources`, which say whether such text is wanted. Out: a .jsonl file for each batch,
which prepare_corpus reads as it reads files. A text begins as the parent's documents begin, and every token is drawn
from the parent's own distribution, so what it writes is as broad as what it was trained on, and needs no download
(docs/text.md). A chat is one question and its answer, both written by the parent behind its chat template. Run:
`puzzle stage write_text`.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from transformers import PreTrainedTokenizerBase

from storage.code_digest import code_digest
from storage.files import InputError, digest_of, write_whole
from storage.model_config import expected_shapes
from storage.params import Params
from storage.parent import Parent
from storage.parent_info import REBUILD as REBUILD_PARENT
from storage.paths import Paths
from storage.pieces import Pieces
from storage.tokenizer import (
    added_bos,
    chat_template,
    check_tokens,
    document_separator,
    load_tokenizer,
    tokenizer_digest,
    tokenizer_errors,
)
from storage.written_text import REBUILD, WrittenKind, batch_name
from tasks.puzzle.model.child import build
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.model.writing import Drawing, Turn, write
from tasks.puzzle.search_space import parent_attention, parent_ffn

_OPENING = re.compile("[A-Z][a-z]{2,}")
_ROLES = ("user", "assistant")
_MARKS = ("The question stands here.", "The answer stands here.")
"""Contents of a chat that is rendered to find what the template writes around them."""
_WAY_OUT = "take the source with `messages` out of prepare_corpus"


@dataclass(frozen=True)
class Batch:
    """Rows that are written together: texts or chats, the batch's number, its content key."""

    kind: WrittenKind
    number: int
    key: str

    @property
    def name(self) -> str:
        """Return the name of the batch's piece."""
        return batch_name(self.kind, self.number)


class Writer:
    """The parent in memory, and the scripts that it writes by; threads may share it."""

    def __init__(self, params: Params, paths: Paths) -> None:
        run, parent = params.run, Parent(paths.parent)
        self.config = parent.config
        blocks = [(parent_attention(self.config), parent_ffn(self.config))] * self.config.num_blocks
        tensors = {name: parent.checkpoint.tensor(name) for name in expected_shapes(self.config, blocks)}
        self.model = build(self.config, blocks, tensors, prepare_compute(run.device, run.dtype, run.threads))
        self.tokenizer = load_tokenizer(parent.folder, REBUILD_PARENT)
        self._text, self._openings = (
            _text(self.tokenizer, parent.folder),
            _openings(self.tokenizer, self.config.vocab_size),
        )
        self._chat = _chat(self.tokenizer, parent.folder) if "chats" in params.prepare_corpus.written_kinds else []
        given = (turn.given for turn in (self._text, *self._chat))
        check_tokens(itertools.chain.from_iterable(given), self.config.vocab_size, parent.folder)

    def script(self, kind: WrittenKind, chance: random.Random) -> Iterator[list[Turn]]:
        """Yield the turns of text after text: of a document that opens with a random word, or of a chat."""
        while True:
            if kind == "chats":
                yield self._chat
            else:
                opening = (chance.choice(self._openings),) if self._openings else ()
                yield [replace(self._text, opening=opening)]


@task(cache_policy=NO_CACHE)
def plan_batches(params: Params, paths: Paths) -> list[Batch]:
    """Plan the batches that are still to write; delete the pieces that no batch has."""
    settings, parent = params.write_text, Parent(paths.parent)
    parent.checkpoint.verify_files()  # the tokenizer's among them
    inputs = {
        "parent": parent.digest,
        "tokenizer": tokenizer_digest(paths.parent),
        "settings": settings.model_dump(exclude={"tokens", "chat_tokens"}),
        "run": params.run.model_dump(exclude={"workers"}),
        "code": code_digest("tasks.write_text:write_batch"),
    }
    batches = []
    for kind in params.prepare_corpus.written_kinds:
        count = settings.batches(kind)
        if not count:
            key = "tokens" if kind == "texts" else "chat_tokens"
            raise InputError(
                f"prepare_corpus takes {kind} of kind written, and write_text.{key} is 0; raise it or drop the source"
            )
        batches += [Batch(kind, number, digest_of([inputs, kind, number])) for number in range(count)]
    paths.written.mkdir(parents=True, exist_ok=True)
    missing = set(Pieces(paths.written, REBUILD).keep_only({batch.name: batch.key for batch in batches}))
    return [batch for batch in batches if batch.name in missing]


@task(cache_policy=NO_CACHE)
def load_writer(params: Params, paths: Paths) -> Writer:
    """Load the parent whole.

    Raises:
        InputError: chats are wanted, and the parent has no chat template that says where a turn ends.
    """
    return Writer(params, paths)


@task(cache_policy=NO_CACHE)
def write_batch(batch: Batch, writer: Writer, params: Params, paths: Paths) -> None:
    """Write one batch of rows."""
    run, settings = params.run, params.write_text
    prepare_compute(run.device, run.dtype, run.threads)
    seed = int(digest_of([run.seed, batch.kind, batch.number])[:15], 16)
    generator = torch.Generator().manual_seed(seed)
    scripts = [writer.script(batch.kind, random.Random(f"{seed} {row}")) for row in range(settings.rows)]
    drawing = Drawing(settings.temperature, settings.top_p)
    rows = write(writer.config, writer.model, scripts, settings.row_tokens, drawing, generator)
    path = paths.written / f"{batch.name}.jsonl"
    with write_whole(path) as temporary:
        lines = (
            json.dumps(line, ensure_ascii=False) + "\n"
            for row in rows
            for line in _lines(row, batch.kind, writer.tokenizer)
        )
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
    Pieces(paths.written, REBUILD).finish(batch.name, batch.key, [path])


def _lines(
    texts: list[list[list[int]]], kind: WrittenKind, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Return rows of the file, from the tokens of every turn of every text; texts that lack a part are left out."""
    special = _special_ids(tokenizer)
    for turns in texts:
        parts = [str(tokenizer.decode([token for token in tokens if token not in special])) for tokens in turns]
        if not all(part.strip() for part in parts):
            continue
        if kind == "texts":
            yield {"text": parts[0]}
        elif len(parts) == len(_ROLES):
            yield {"messages": [{"role": role, "content": part} for role, part in zip(_ROLES, parts, strict=True)]}


def _text(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Turn:
    """Return a document: behind BOS or the token that separates documents, up to the token that ends it."""
    bos = added_bos(tokenizer)
    start = _separator(tokenizer, folder) if bos is None else bos
    return Turn((start,), _ends(tokenizer, folder))


def _openings(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Return the tokens that are a word as a sentence begins with one."""
    words = tokenizer.batch_decode([[token] for token in range(min(len(tokenizer), vocab_size))])
    return [token for token, word in enumerate(words) if _OPENING.fullmatch(word)]


def _chat(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[Turn]:
    """Return a question and its answer, each up to the token that the chat template ends it with."""
    problem = f"the parent in {folder} cannot write chats"
    template = chat_template(tokenizer, problem, _WAY_OUT)
    chat = [{"role": role, "content": mark} for role, mark in zip(_ROLES, _MARKS, strict=True)]
    with tokenizer_errors(problem, _WAY_OUT):
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template))
    parts = re.split("|".join(map(re.escape, _MARKS)), rendered)
    part_ids = [tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts]
    if len(parts) != 3 or not part_ids[0] or not set(part_ids[1][:1]) & _special_ids(tokenizer):
        raise InputError(f"{problem}: its chat template does not end a question with a special token; {_WAY_OUT}")
    ends = _ends(tokenizer, folder) | {part_ids[1][0]}
    return [Turn(part_ids[0], ends), Turn(part_ids[1], ends)]


def _ends(tokenizer: PreTrainedTokenizerBase, folder: Path) -> frozenset[int]:
    """Return the tokens that end a document or a turn: BOS, EOS, and the token that separates documents."""
    tokens = (_separator(tokenizer, folder), tokenizer.eos_token_id, tokenizer.bos_token_id)
    return frozenset(token for token in tokens if token is not None)


def _separator(tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    return tokenizer.get_vocab()[document_separator(tokenizer, folder)]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that are marks and no text, also those that the tokenizer gives no role."""
    marks = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return marks | set(tokenizer.all_special_ids)
