"""prepare_corpus end to end: sources of every kind, a real tokenizer, the artifact, resuming, and bad input."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from storage.checkpoints import CheckpointWriter
from storage.corpus import SPLITS, read_manifest, read_sequences
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
    template: str | None = CHAT_TEMPLATE,
    config: ModelConfig = CONFIG,
) -> None:
    """A byte-level BPE tokenizer trained on a sentence, and the facts and checksums that prepare_parent writes."""
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the parameters and the return value of a function"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
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
    """The two sections that the stage reads; Params' rules across sections are not its business."""
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
    """The documents of each split, decoded from the artifact."""
    tokenizer = AutoTokenizer.from_pretrained(paths.parent)
    decoded = {split: str(tokenizer.decode(read_sequences(paths.corpus, split).ravel().tolist())) for split in SPLITS}
    return {split: text.split("<|endoftext|>") for split, text in decoded.items()}


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
    for split in SPLITS:
        *whole, cut = documents[split]
        assert whole
        assert set(whole) <= set(rows)
        assert any(row.startswith(cut) for row in rows)
    assert not set(documents["train"]) & (set(documents["validation"]) | set(documents["calibration"]))
    assert not set(documents["validation"]) & set(documents["calibration"])


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


def test_a_finished_corpus_is_kept_until_something_changes(paths: Paths, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl")
    settings = params(sources=[files_source(str(file))])

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
    with pytest.raises(InputError, match=r"gives token \d+, and its embedding has 40 rows"):
        pack_corpus.fn(params(sources=[source]), paths)
    (paths.parent / "puzzle_parent.json").unlink()
    with pytest.raises(InputError, match="run `dvc repro prepare_parent`"):
        pack_corpus.fn(params(sources=[source]), paths)


def test_without_an_end_of_document_token_the_eos_token_separates(paths: Paths, tmp_path: Path) -> None:
    save_parent(paths.parent, PARENT_TOKENS[1:])
    pack_corpus.fn(params(sources=[files_source(str(write_jsonl(tmp_path / "a.jsonl")))]), paths)
    manifest = read_manifest(paths.corpus)
    assert manifest.separator == "<|im_end|>"
    documents = np.count_nonzero(read_sequences(paths.corpus, "train") == manifest.separator_id)
    assert documents in (manifest.splits["train"].documents, manifest.splits["train"].documents - 1)
