"""prepare_corpus end to end: sources of every kind, a real tokenizer, the artifact, resuming, and bad input."""

import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from storage.checkpoints import CheckpointWriter
from storage.corpus import SPLITS, domain_split, read_documents, read_manifest, read_sequences
from storage.files import InputError
from storage.model_config import NORM, ModelConfig
from storage.params import Params
from storage.parent_info import write_parent_info
from storage.paths import Paths
from storage.sections import PrepareCorpus, Run
from tasks.prepare_corpus import pack_corpus
from tests.records import parent_info

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=16,
    num_blocks=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=32,
    vocab_size=400,
    rms_norm_eps=1e-5,
    rope={"rope_type": "default", "rope_theta": 1e4},
    context=64,
    tie_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    activation="silu",
)
CHAT_TEMPLATE = (
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
PARENT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def save_parent(
    folder: Path,
    special_tokens: tuple[str, ...] = PARENT_TOKENS,
    template: str | dict[str, str] | None = CHAT_TEMPLATE,
    config: ModelConfig = CONFIG,
    bos: str | None = None,
    normalizer: normalizers.Normalizer | None = None,
) -> None:
    """Save a byte-level BPE tokenizer trained on a sentence, and the facts and checksums that prepare_parent writes.

    It puts `bos` before every text, as Llama-3's tokenizer does.
    """
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the parameters and the return value of a function"], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.token_to_id(bos))])
    if normalizer:
        tokenizer.normalizer = normalizer
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token=bos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    write_parent_info(folder, parent_info(config))
    writer = CheckpointWriter(folder, 1 << 20)
    writer.add({NORM: torch.ones(CONFIG.hidden_size)})
    writer.finish()


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path / "artifacts")
    save_parent(paths.parent)
    return paths


def params(seed: int = 0, **section: Any) -> Params:
    """Return the two sections that the stage reads; Params' rules across sections are not its business."""
    sizes = {"seq_len": 32, "train_tokens": 3200, "calibration_tokens": 1600, "validation_tokens": 1600}
    return Params.model_construct(
        run=Run.model_validate({"seed": seed}), prepare_corpus=PrepareCorpus.model_validate({**sizes, **section})
    )


def files_source(path: str, **more: Any) -> dict[str, Any]:
    return {"kind": "files", "path": path, "licence": "CC0-1.0", **more}


def prose(name: str) -> str:
    return "\n\n".join(f"Paragraph {index} of {name}, " + f"about {name} and {index}; " * 6 for index in range(3))


def write_jsonl(file: Path, count: int = 60, name: str = "item") -> Path:
    file.write_text("\n".join(json.dumps({"text": prose(f"{name} {index}")}) for index in range(count)))
    return file


def texts(paths: Paths) -> dict[str, list[str]]:
    """Return the documents of each split as far as they were packed, decoded from the artifact."""
    tokenizer = AutoTokenizer.from_pretrained(paths.parent)
    decoded = {}
    for split in read_manifest(paths.corpus).splits:
        tokens = read_sequences(paths.corpus, split)
        rows = tokens.reshape(1, -1) if split == "train" else tokens
        decoded[split] = [text for row in rows for text in str(tokenizer.decode(row.tolist())).split("<|endoftext|>")]
    return decoded


def test_the_embedded_corpus(paths: Paths) -> None:
    assert pack_corpus.fn(params(), paths) == paths.corpus
    manifest = read_manifest(paths.corpus)
    assert {name: split.tokens for name, split in manifest.splits.items()} == {
        "train": 3200,
        "calibration": 1600,
        "validation": 1600,
    }
    assert (manifest.separator, manifest.separator_id) == ("<|endoftext|>", 0)
    assert sum(source.tokens for source in manifest.sources) == 6400
    assert all(source.licence and source.version for source in manifest.sources)
    assert sum(source.documents for source in manifest.sources) == sum(s.documents for s in manifest.splits.values())
    assert {path.name for path in paths.corpus.iterdir()} == {"manifest.json", *(f"{name}.parquet" for name in SPLITS)}
    assert [path.name for path in paths.root.iterdir() if path.name.startswith(".")] == []


def test_tokens_decode_to_the_documents_and_splits_share_none(paths: Paths, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl")
    pack_corpus.fn(params(sources=[files_source(str(file))]), paths)
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    documents = texts(paths)
    *whole, cut = documents["train"]
    assert whole
    assert set(whole) <= set(rows)
    assert any(row.startswith(cut) for row in rows)
    of_row: dict[str, set[int]] = {}
    for split in SPLITS:
        assert documents[split]
        found = [{index for index, row in enumerate(rows) if text in row} for text in documents[split] if text]
        of_row[split] = set.union(*found)
        assert all(found), split
    assert not of_row["train"] & (of_row["validation"] | of_row["calibration"])
    assert not of_row["validation"] & of_row["calibration"]


def test_two_runs_give_the_same_bytes_and_a_seed_other_ones(paths: Paths, tmp_path: Path) -> None:
    settings = params(sources=[files_source(str(write_jsonl(tmp_path / "a.jsonl")))])
    pack_corpus.fn(settings, paths)
    first = {path.name: path.read_bytes() for path in paths.corpus.iterdir()}
    (paths.corpus / "manifest.json").unlink()
    (paths.corpus / "stranger").write_text("of another version")
    pack_corpus.fn(settings, paths)
    assert {path.name: path.read_bytes() for path in paths.corpus.iterdir()} == first
    before = read_manifest(paths.corpus).content_hash
    pack_corpus.fn(params(seed=1, sources=[files_source(str(tmp_path / "a.jsonl"))]), paths)
    assert read_manifest(paths.corpus).content_hash != before


def test_a_finished_corpus_is_kept_until_something_changes(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, novels = write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "novels.jsonl", name="novels")
    domains = {"fiction": {"sources": [files_source(str(novels))], "tokens": 64}}
    settings = params(sources=[files_source(str(file))], domains=domains)

    def made_anew() -> bool:
        os.utime(paths.corpus / "manifest.json", (1, 1))
        pack_corpus.fn(settings, paths)
        return (paths.corpus / "manifest.json").stat().st_mtime != 1

    pack_corpus.fn(settings, paths)
    assert not made_anew()
    damaged = paths.corpus / "train.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    assert made_anew(), "a damaged split"
    write_jsonl(file, 61)
    assert made_anew(), "another source file"
    write_jsonl(novels, 61, "novels")
    assert made_anew(), "another file of a domain"
    monkeypatch.setattr("tasks.prepare_corpus.code_digest", lambda _: "of other code")
    assert made_anew(), "other code"
    save_parent(paths.parent, template="{{ messages[0].content }}")
    assert made_anew(), "another tokenizer"
    assert not made_anew()


def test_a_failing_run_keeps_the_corpus_that_was_there(paths: Paths, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl")
    pack_corpus.fn(params(sources=[files_source(str(file))]), paths)
    before = read_manifest(paths.corpus)
    with pytest.raises(InputError, match=r"the source .*a\.jsonl ends before"):
        pack_corpus.fn(params(sources=[files_source(str(file))], train_tokens=320_000), paths)
    assert read_manifest(paths.corpus) == before
    assert {path.name for path in paths.root.iterdir()} == {"parent", "corpus"}


def test_a_mix_of_sources_has_the_shares_asked_for(paths: Paths, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", 200, "first")
    table = pa.table({"body": [prose(f"second {index}") for index in range(200)]})
    pq.write_table(table, tmp_path / "b.parquet")
    sources = [
        files_source(str(tmp_path / "a.jsonl"), weight=3.0),
        files_source(str(tmp_path / "*.parquet"), text="body", licence="MIT"),
    ]
    pack_corpus.fn(params(sources=sources, train_tokens=12_800), paths)
    facts = {Path(source.name).name: source for source in read_manifest(paths.corpus).sources}
    assert facts["a.jsonl"].tokens / (12_800 + 3_200) == pytest.approx(0.75, abs=0.06)  # to a document per split
    assert facts["*.parquet"].licence == "MIT"


def test_chats_are_rendered_by_the_parents_template_on_a_fixed_day(paths: Paths, tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": prose(f"question {index}")}, {"role": "assistant", "content": f"It is {index}."}]
        for index in range(60)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"chat": chat}) for chat in chats))
    pack_corpus.fn(params(sources=[files_source(str(tmp_path / "a.jsonl"), messages="chat")]), paths)
    first = texts(paths)["train"][0]
    assert first.startswith("26 Jul 2024\n<|im_start|>user\nParagraph 0 of question ")
    assert first.endswith("<|im_end|>\n")
    tokens = read_sequences(paths.corpus, "train").ravel()
    assert 1 in tokens, "the template's marks are special tokens"


def test_a_tool_call_is_rendered_or_its_chat_left_out(paths: Paths, tmp_path: Path) -> None:
    """A template that knows no tools printed `None` in place of the call, or nothing in place of the answer."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look_up", "arguments": "{}"}}]}
    plain = [
        [{"from": "human", "value": prose(f"chat {index}")}, {"from": "gpt", "value": "Yes."}] for index in range(60)
    ]
    rows = [*({"chat": chat} for chat in plain), *({"chat": [*chat, call]} for chat in plain[:5]), {"chat": []}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = params(sources=[files_source(str(tmp_path / "a.jsonl"), messages="chat")])
    pack_corpus.fn(settings, paths)
    assert "None" not in str(texts(paths))
    *_, calls, empty = read_manifest(paths.corpus).notes
    assert "5 of 66 skipped: the parent's chat template leaves out tool calls" in calls
    assert "1 of 66 skipped: no text" in empty
    names = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    save_parent(paths.parent, template="{% for m in messages %}{{ m.content }}" + names + "{% endfor %}")
    pack_corpus.fn(settings, paths)
    assert "look_up" in str(texts(paths))
    assert "None" not in str(texts(paths))


def test_a_template_that_reads_parts_gets_parts(paths: Paths, tmp_path: Path) -> None:
    """Templates of models that see take a text for a list of parts: they wrote chats without their words."""
    chats = [[{"role": "user", "content": prose(f"question {index}")}] for index in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"chat": chat}) for chat in chats))
    settings = params(sources=[files_source(str(tmp_path / "a.jsonl"), messages="chat")])
    parts = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    save_parent(paths.parent, template="{% for m in messages %}<|im_start|>" + parts + "{% endfor %}")
    pack_corpus.fn(settings, paths)
    assert texts(paths)["train"][0].startswith("<|im_start|>Paragraph 0 of question ")
    for broken, reason in (
        ("{{ messages[0].role }}", "leaves out"),
        ("{{ 1 / 0 }}", r"refuses .* \(division by zero\)"),
    ):
        save_parent(paths.parent, template=broken)
        with pytest.raises(InputError, match=f"60 of 60 rows cannot be used.*chat template {reason}"):
            pack_corpus.fn(settings, paths)


def test_a_bos_stands_before_every_document_where_the_tokenizer_adds_it(paths: Paths, tmp_path: Path) -> None:
    """Plain text had none, and a rendered chat would get a second one where the template writes it."""
    save_parent(paths.parent, (*PARENT_TOKENS, "<s>"), "<s>" + CHAT_TEMPLATE, bos="<s>")
    rows = [{"text": f"<s>{prose(f'text {index}')}"} for index in range(60)]
    chats = [{"chat": [{"role": "user", "content": prose(f"chat {index}")}]} for index in range(60)]
    for name, documents in (("rows", rows), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    sources = [
        files_source(str(tmp_path / "rows.jsonl")),
        files_source(str(tmp_path / "chats.jsonl"), messages="chat"),
    ]
    pack_corpus.fn(params(sources=sources), paths)
    manifest = read_manifest(paths.corpus)
    bos = AutoTokenizer.from_pretrained(paths.parent).bos_token_id
    assert (manifest.bos, manifest.separator) == ("<s>", "<|endoftext|>")
    for split in SPLITS:
        tokens = read_sequences(paths.corpus, split)
        ends, begins = (np.flatnonzero(tokens.ravel() == token) for token in (manifest.separator_id, bos))
        inside = ends[ends < tokens.size - 1] + 1
        starts = {0, *inside} if split == "train" else {*range(0, tokens.size, tokens.shape[1]), *inside}
        assert set(begins) <= starts, split
        assert split != "train" or set(begins) == starts
        assert set(read_documents(paths.corpus, split)) <= set(range(manifest.splits[split].documents))
    save_parent(paths.parent, (*PARENT_TOKENS, "<s>"))
    pack_corpus.fn(params(sources=sources), paths)
    assert read_manifest(paths.corpus).bos is None
    assert bos not in read_sequences(paths.corpus, "train"), "another tokenizer has the token and does not add it"


def test_a_held_out_domain_is_a_split_of_its_own(paths: Paths, tmp_path: Path) -> None:
    code, novels = (str(write_jsonl(tmp_path / f"{name}.jsonl", 120, name)) for name in ("code", "novels"))
    domains = {"fiction": {"sources": [files_source(novels)], "tokens": 640}}
    pack_corpus.fn(params(sources=[files_source(code)], domains=domains), paths)
    manifest, split = read_manifest(paths.corpus), domain_split("fiction")
    assert list(manifest.splits) == [*SPLITS, split]
    assert (paths.corpus / "domain_fiction.parquet").is_file()
    assert read_documents(paths.corpus, split).tolist() == list(range(20)), "a sequence from each document"
    assert all(text.startswith("Paragraph 0 of novels") for text in texts(paths)[split])
    assert not any("novels" in text for name in SPLITS for text in texts(paths)[name])
    assert {source.domain: source.tokens for source in manifest.sources} == {"fiction": 640, "training": 6400}
    before = {name: (paths.corpus / f"{name}.parquet").read_bytes() for name in manifest.splits}
    pack_corpus.fn(params(sources=[files_source(code)], domains=domains, train_tokens=6400), paths)
    kept = {name for name in before if (paths.corpus / f"{name}.parquet").read_bytes() == before[name]}
    assert kept == set(before) - {"train"}
    pack_corpus.fn(params(sources=[files_source(code)]), paths)
    assert not (paths.corpus / "domain_fiction.parquet").exists()


def test_domains_that_cannot_be_made(paths: Paths, tmp_path: Path) -> None:
    code, novel = (str(write_jsonl(tmp_path / f"{name}.jsonl", count, name)) for name, count in (("a", 60), ("b", 1)))
    for source, message in (
        (novel, r"the fiction corpus needs 64,000 tokens, .*b\.jsonl ends before\. Found: domain_fiction \d+ of"),
        (str(tmp_path / "*.jsonl"), r"domains\.fiction must be held out, and .*a\.jsonl is in `sources` too"),
    ):
        domains = {"fiction": {"sources": [files_source(source)], "tokens": 64_000}}
        with pytest.raises(InputError, match=message):
            pack_corpus.fn(params(sources=[files_source(code)], domains=domains), paths)


def test_special_tokens_spelt_out_in_plain_text_are_text(paths: Paths, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "\n\n".join(f"Document {index} ends with <|endoftext|>, ends here, " * 3 for index in range(200))
    )
    pack_corpus.fn(params(sources=[files_source(str(tmp_path / "a.txt"))]), paths)
    separators = sum(np.count_nonzero(read_sequences(paths.corpus, split) == 0) for split in SPLITS)
    assert separators <= sum(split.documents for split in read_manifest(paths.corpus).splits.values())


def test_files_of_s3(paths: Paths, tmp_path: Path, bucket: str) -> None:
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    for name in ("one", "two"):
        store.put_file(str(write_jsonl(tmp_path / f"{name}.jsonl", 40, name)), f"{bucket}/corpus/{name}.jsonl")
    pack_corpus.fn(params(sources=[files_source(f"{bucket}/corpus/*.jsonl")]), paths)
    remote = read_manifest(paths.corpus)
    pack_corpus.fn(params(sources=[files_source(str(tmp_path / "*.jsonl"))]), paths)
    assert read_manifest(paths.corpus).content_hash == remote.content_hash, "where files lie changes no token"
    with pytest.raises(InputError, match=r"no file matches s3://.*/missing-\*"):
        pack_corpus.fn(params(sources=[files_source(f"{bucket}/missing-*")]), paths)


def test_sequences_longer_than_the_parents_context_are_refused_first(paths: Paths) -> None:
    sources = [files_source("no-such-file.jsonl")]
    with pytest.raises(InputError, match=r"seq_len is 128, and the parent .* reads at most 64 tokens"):
        pack_corpus.fn(
            params(seq_len=128, train_tokens=640, calibration_tokens=128, validation_tokens=128, sources=sources), paths
        )
    with pytest.raises(InputError, match=r"no-such-file\.jsonl"):
        pack_corpus.fn(params(seq_len=64, sources=sources), paths)


def test_sources_that_cannot_be_used(paths: Paths, tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text("text\n")
    tool = [{"role": "tool", "content": prose("a tool")}]
    (tmp_path / "tool.jsonl").write_text("\n".join(json.dumps({"chat": tool}) for _ in range(9)))
    for source, message in (
        (files_source(file, text="body"), "no column 'body'; it has text"),
        (files_source(str(tmp_path / "a.csv")), "corpus files end in"),
        (files_source(str(tmp_path / "tool.jsonl"), messages="chat"), "refuses this chat .no tools here"),
    ):
        with pytest.raises(InputError, match=message):
            pack_corpus.fn(params(sources=[source]), paths)


def test_parents_that_cannot_be_used(paths: Paths, tmp_path: Path) -> None:
    source = files_source(str(write_jsonl(tmp_path / "a.jsonl")))
    save_parent(paths.parent, template=None)
    with pytest.raises(InputError, match="no chat template"):
        pack_corpus.fn(params(sources=[{**source, "messages": "chat"}]), paths)
    save_parent(paths.parent, config=replace(CONFIG, vocab_size=40))
    with pytest.raises(InputError, match=r"gives token \d+, and the embedding has 40 rows"):
        pack_corpus.fn(params(sources=[source]), paths)
    save_parent(paths.parent, template={"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE})
    with pytest.raises(InputError, match=r"no chat template to choose .*name a text column instead"):
        pack_corpus.fn(params(sources=[{**source, "messages": "chat"}]), paths)
    (paths.parent / "puzzle_parent.json").unlink()
    with pytest.raises(InputError, match="run `dvc repro prepare_parent`"):
        pack_corpus.fn(params(sources=[source]), paths)


def test_a_tokenizer_that_panics_on_a_letter_is_one_sentence(paths: Paths, tmp_path: Path) -> None:
    """A panic of the tokenizer's library is no Exception; this table of replacements points nowhere for \u0142."""
    units = [0] * 300
    units[0xC5] = 0xC5 | 100_000 << 10
    table = struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + b"a\0"
    save_parent(paths.parent, normalizer=normalizers.Precompiled(table))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": prose(f"\u0142 {i}")}) for i in range(60)))
    with pytest.raises(InputError, match=r"cannot encode a document of .*a\.jsonl#\d+ on .*index out of bounds.*leave"):
        pack_corpus.fn(params(sources=[files_source(str(tmp_path / "a.jsonl"))]), paths)


def test_without_an_end_of_document_token_the_eos_token_separates(paths: Paths, tmp_path: Path) -> None:
    save_parent(paths.parent, PARENT_TOKENS[1:])
    pack_corpus.fn(params(sources=[files_source(str(write_jsonl(tmp_path / "a.jsonl")))]), paths)
    manifest = read_manifest(paths.corpus)
    assert manifest.separator == "<|im_end|>"
    documents = np.count_nonzero(read_sequences(paths.corpus, "train") == manifest.separator_id)
    assert documents in (manifest.splits["train"].documents, manifest.splits["train"].documents - 1)
