"""write_text end to end: what is written, its bytes, resuming, what the corpus makes of it, and bad input."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from storage.corpus import read_manifest
from storage.files import DamagedFileError, InputError
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.tokenizer import load_tokenizer
from tasks import write_text
from tasks.prepare_corpus import pack_corpus
from tasks.prepare_parent import prepare_parent
from tasks.write_text import Batch, load_writer, plan_batches, write_batch
from tests.clone import CHAT_TEMPLATE, END, tiny_parent
from tests.settings import SEQ_LEN, tiny_params
from tests.stages import checksums
from tests.tasks.test_prepare_corpus import PARENT_TOKENS, save_parent
from tests.tiny import flip_byte

WRITTEN = {"kind": "written"}
CHATS = {"kind": "written", "messages": "messages"}
OPENING = "Able"
TEXT_TOKENS = {"tokens": 900, "chat_tokens": 900, "rows": 8, "row_tokens": 64}


def settings(source: Path, *sources: dict[str, Any], **changed: Any) -> Params:
    corpus = {"seq_len": SEQ_LEN, "train_tokens": 48 * SEQ_LEN, "sources": list(sources)}
    corpus |= {"calibration_tokens": 16 * SEQ_LEN, "validation_tokens": 8 * SEQ_LEN}
    return tiny_params(
        prepare_parent={"source": str(source)}, prepare_corpus=corpus, write_text={**TEXT_TOKENS, **changed}
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny parent whose last token is the only one that a sentence could begin with."""
    folder = tmp_path_factory.mktemp("source")
    tiny_parent(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[OPENING] = vocabulary.pop(max(vocabulary, key=vocabulary.__getitem__))
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    paths = Paths(tmp_path_factory.mktemp("run"))
    prepare_parent.fn(settings(source, WRITTEN), paths)
    return paths


def run(params: Params, paths: Paths, *, backwards: bool = False) -> list[Batch]:
    batches = plan_batches.fn(params, paths)
    if batches:
        writer = load_writer.fn(params, paths)
        for batch in reversed(batches) if backwards else batches:
            write_batch.fn(batch, writer, params, paths)
    return batches


def rows_of(paths: Paths, kind: str) -> list[dict[str, Any]]:
    files = sorted(paths.written.glob(f"{kind}_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_corpus_is_made_of_what_the_parent_wrote(source: Path, prepared: Paths) -> None:
    params = settings(source, {**WRITTEN, "weight": 3.0}, CHATS)
    run(params, prepared)
    texts, chats = rows_of(prepared, "texts"), rows_of(prepared, "chats")
    assert len(texts) >= 16 and all(row["text"].startswith(OPENING) for row in texts)  # two batches of eight rows
    assert len({row["text"] for row in texts}) == len(texts)
    assert chats and all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in chats)
    assert not any(mark in json.dumps(texts + chats) for mark in (END, "<|im_start|>", "<|im_end|>"))
    pack_corpus.fn(params, prepared)
    tokens = {ingredient.name.split()[0]: ingredient.tokens for ingredient in read_manifest(prepared.corpus).sources}
    assert tokens["texts"] == pytest.approx(3 * tokens["chats"], rel=0.2)


def test_bytes_depend_on_the_seed_alone_and_finished_batches_stay(source: Path, prepared: Paths) -> None:
    params = settings(source, WRITTEN)
    run(params, prepared)
    written = checksums(prepared.written)
    assert run(params, prepared) == []
    first = prepared.written / "texts_00000.jsonl"
    first.unlink()
    assert [batch.number for batch in run(params, prepared)] == [0]
    assert checksums(prepared.written) == written
    more = settings(source, WRITTEN, tokens=3 * 8 * 64)
    assert [batch.number for batch in run(more, prepared)] == [2]
    for path in prepared.written.glob("*.jsonl"):
        path.unlink()
    run(params, prepared, backwards=True)
    assert checksums(prepared.written) == written
    other = params.model_copy(update={"run": params.run.model_copy(update={"seed": 1})})
    assert len(run(other, prepared)) == 2
    assert checksums(prepared.written) != written


@pytest.mark.parametrize("other", ["weights", "temperature", "code"])
def test_text_of_other_inputs_is_written_anew(
    other: str, source: Path, prepared: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, paths = settings(source, WRITTEN), Paths(shutil.copytree(prepared.root, tmp_path / "artifacts"))
    run(params, paths)
    if other == "weights":
        monkeypatch.setattr(Parent, "digest", "of other weights")
    elif other == "temperature":
        params = settings(source, WRITTEN, temperature=0.5)
    else:
        monkeypatch.setattr("tasks.write_text.code_digest", lambda _: "of other code")
    assert len(plan_batches.fn(params, paths)) == 2


def test_a_text_begins_and_ends_as_the_parents_documents_do(tmp_path: Path) -> None:
    """Behind the token that separates documents, or behind BOS where its tokenizer puts one before every text."""
    for bos in (None, "<s>"):
        save_parent(tmp_path / "parent", (*PARENT_TOKENS, "<s>"), bos=bos)
        tokenizer = load_tokenizer(tmp_path / "parent", "")
        separator, end, start = (tokenizer.convert_tokens_to_ids(mark) for mark in (END, "<|im_end|>", "<s>"))
        turn = write_text._text(tokenizer, tmp_path / "parent")
        assert turn.given == ((start,) if bos else (separator,))
        assert turn.ends == ({separator, end, start} if bos else {separator, end})


def test_nothing_is_written_for_a_corpus_that_takes_none(source: Path, prepared: Paths) -> None:
    run(settings(source, WRITTEN), prepared)
    assert run(settings(source, {"kind": "embedded"}), prepared) == []
    assert list(prepared.written.iterdir()) == []


def test_damage_and_missing_text_are_reported(source: Path, prepared: Paths) -> None:
    params = settings(source, WRITTEN)
    run(params, prepared)
    with pytest.raises(InputError, match=r"has no chats of the parent's; run `dvc repro write_text`"):
        pack_corpus.fn(settings(source, CHATS), prepared)
    flip_byte(prepared.written / "texts_00001.jsonl", 5)
    with pytest.raises(DamagedFileError, match="write_text"):
        pack_corpus.fn(params, prepared)
    with pytest.raises(InputError, match=r"takes texts of kind written, and write_text\.tokens is 0"):
        plan_batches.fn(settings(source, WRITTEN, tokens=0), prepared)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "chat_template is not set"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "does not end a question with"),
        ("{{ raise_exception('no chats here') }}", "(no chats here)"),
        ("{{ messages[2].content }}", "has no element 2"),
        ("{% for %}", "Expected"),
    ],
)
def test_chats_need_a_template_that_says_where_a_question_ends(
    source: Path, tmp_path: Path, template: str | None, reason: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    tokenizer.chat_template = template
    folder = tmp_path / "source"
    tiny_parent(folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    params, paths = settings(folder, CHATS), Paths(tmp_path / "run")
    prepare_parent.fn(params, paths)
    with pytest.raises(InputError, match=rf"cannot write chats.*{re.escape(reason)}"):
        run(params, paths)


def test_marks_beyond_the_embedding_are_refused(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_start|>", "<|turn|>")
    tokenizer.save_pretrained(folder)
    params, paths = settings(folder, CHATS), Paths(tmp_path / "run")
    prepare_parent.fn(params, paths)
    with pytest.raises(InputError, match=rf"gives token {len(tokenizer) - 1}, and the embedding has 320 rows"):
        run(params, paths)
