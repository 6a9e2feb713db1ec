"""Files beside the weights: they travel from source to parent, child and exports; nothing else of the machine does."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from storage.files import InputError
from storage.parent import Parent
from storage.paths import Paths
from storage.side_files import GENERATION_FILES, licence_of, side_files
from storage.variants import Attention, Ffn, Replacement
from tasks.checkpoints import exports
from tasks.checkpoints.children import publish
from tasks.checkpoints.exports import read_checkpoint
from tasks.prepare_parent import prepare_parent
from tests.chosen import chosen_architecture
from tests.settings import tiny_params
from tests.tiny import save_tiny, save_tokenizer

TEMPLATES = {"default": "{{ 'the default' }}", "tool_use": "{{ 'with tools' }}", "rag": "{{ 'with texts' }}"}


def in_files(source: Path) -> None:
    (source / "chat_template.jinja").write_text(TEMPLATES["default"])
    (source / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (source / f"additional_chat_templates/{name}.jinja").write_text(TEMPLATES[name])


def in_the_config(source: Path) -> None:
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
    (source / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("place", [in_files, in_the_config])
def test_all_templates_and_files_travel_to_the_exports(place: Callable[[Path], None], tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama3-untied-head_dim-bias", source)
    save_tokenizer(source)
    place(source)
    extra = ("LICENSE", "LICENSE[1].txt", "added_tokens.json", "chat_template.json")
    for name in extra:
        (source / name).write_text("{}")
    paths = Paths(tmp_path / "artifacts")
    prepare_parent.fn(tiny_params(prepare_parent={"source": str(source)}), paths)
    parent, child = Parent(paths.parent), tmp_path / "child"
    blocks = [Replacement(index, 1, Attention("gqa", 2), Ffn("gated", 96)) for index in range(3)]
    tensors = (
        {n: parent.checkpoint.tensor(full) for n, full in parent.checkpoint.block_names(i).items()} for i in range(3)
    )
    publish(child, chosen_architecture(blocks, "tiny", parent.digest), parent, tensors, "not at all", 4.0)
    for folder in (paths.parent, child, *exported(child, tmp_path / "exports")):
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATES
        assert all((folder / name).read_text() == "{}" for name in extra)


def exported(child: Path, out: Path) -> list[Path]:
    """Return folders of the exports with a tokenizer."""
    checkpoint = read_checkpoint("tiny", child, "again")
    for piece in exports.begin(checkpoint, ("nemotron-nas", "padded-llama"), out, 4.0):
        exports.export.fn(piece, checkpoint, out, 4.0)
    return [out / "nemotron-nas", out / "padded-llama"]


# --- links -----------------------------------------------------------------------------------------------------------


def to_a_secret(folder: Path) -> None:
    (folder.parent / "shadow").write_text("secret")
    (folder / "tokenizer_x").symlink_to(folder.parent / "shadow")


def to_a_folder(folder: Path) -> None:
    (folder / "LICENSE").symlink_to(folder.parent)


def to_nothing(folder: Path) -> None:
    (folder / "NOTICE").symlink_to(folder / "gone")


def templates_elsewhere(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere/a.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(folder.parent / "elsewhere")


def of_latin_1(folder: Path) -> None:
    (folder / os.fsdecode(b"LICENSE-\xe9")).write_text("terms")


def a_template_of_latin_1(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / os.fsdecode(b"additional_chat_templates/\xe9.jinja")).write_text("{{ 1 }}")


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "tokenizer_x")


def like_an_object(folder: Path) -> None:
    (folder.parent / "blobs").mkdir()
    (folder.parent / "blobs" / ("a" * 64)).write_text("secret")
    (folder / "tokenizer_x").symlink_to(folder.parent / "blobs" / ("a" * 64))


@pytest.mark.parametrize("is_export", [False, True])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (to_a_secret, r"tokenizer_x leads out of .*source; copy the file there"),
        (like_an_object, r"tokenizer_x leads out of .*source"),
        (to_a_folder, r"LICENSE leads out of"),
        (to_nothing, r"NOTICE is a link that leads nowhere"),
        (templates_elsewhere, r"a.jinja leads out of"),
        (a_pipe, r"tokenizer_x is no regular file"),
        (of_latin_1, r"'LICENSE-\\udce9' in .*source is no name in UTF-8; rename the file"),
        (a_template_of_latin_1, r"'\\udce9.jinja' in .*source is no name in UTF-8"),
    ],
)
def test_no_file_from_elsewhere_travels(
    spoil: Callable[[Path], None], reason: str, is_export: bool, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    save_tokenizer(source)
    spoil(source)
    with pytest.raises(InputError, match=reason):
        if is_export:
            read_checkpoint("tiny", source, "again", is_foreign=True)
        else:
            prepare_parent.fn(tiny_params(prepare_parent={"source": str(source)}), Paths(tmp_path / "artifacts"))


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    source = tmp_path / "models--org--tiny/snapshots/1a2b"
    model, _ = save_tiny("llama", source)
    save_tokenizer(source)
    (source / "LICENSE").write_text("terms")
    (source.parents[1] / "blobs").mkdir()
    for path in [path for path in source.iterdir() if path.is_file()]:
        blob = source.parents[1] / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.replace(blob)
        path.symlink_to(os.path.relpath(blob, source))
    paths = Paths(tmp_path / "artifacts")
    prepare_parent.fn(tiny_params(prepare_parent={"source": str(source)}), paths)
    assert (paths.parent / "LICENSE").read_text() == "terms"
    assert set(Parent(paths.parent).checkpoint.files) == model.state_dict().keys() - {"lm_head.weight"}
    assert not any(path.is_symlink() for path in paths.parent.iterdir())


def test_links_of_dvc_and_within_the_folder_are_files(tmp_path: Path) -> None:
    folder, cached = tmp_path / "artifact", tmp_path / "shared/files/md5/ab" / ("c" * 30)
    folder.mkdir()
    cached.parent.mkdir(parents=True)
    cached.write_text("merges")
    (folder / "merges.txt").symlink_to(cached)
    (folder / "tokenizer.model").write_text("vocabulary")
    (folder / "tokenizer").mkdir()
    (folder / "vocab.txt").symlink_to("tokenizer.model")
    assert [path.name for path in side_files(folder, GENERATION_FILES)] == [
        "merges.txt",
        "tokenizer.model",
        "vocab.txt",
    ]


# --- licences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: llama3.1\n---\n# A card\n", "llama3.1"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ('---\r\nlicense: "apache-2.0" # a comment\r\n---\r\n', "apache-2.0"),
        ("---\nlicense:\n  - mit\n  - apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\nlicense: [mit]\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n", "llama3 (LICENSE)"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: >\n  two\n  lines\n---\n", "two lines"),
        ("---\nlicence: x\ndate: 2024-01-01\n---\nlicense: in the body\n", "unknown"),
        ("# A card\n\nlicense: in the body\n", "unknown"),
        ("---\nlicense: no end\n", "unknown"),
        ("---\nlicense: {a: 1}\n---\n", "unknown"),
        ("---\n[1, 2]\n---\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("---\nlicense: mit\n" + "a: " + "[" * 5000 + "\n---\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_licence_is_that_of_the_front_matter(card: str, licence: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_of(tmp_path) == licence


def test_a_card_that_is_no_text_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It ended prepare_parent after the copy of all weights, and exports after theirs."""
    source = tmp_path / "source"
    save_tiny("llama", source)
    save_tokenizer(source)
    (source / "README.md").write_bytes(b"---\nlicense: m\xfft\n---\n")
    (source / "LICENSE").write_text("terms")
    paths = Paths(tmp_path / "artifacts")
    prepare_parent.fn(tiny_params(prepare_parent={"source": str(source)}), paths)
    assert Parent(paths.parent).info.licence == "see licence files"
    [record] = (record for record in caplog.records if "README.md" in record.message)
    assert "is not UTF-8 (byte 14 is 0xff)" in record.message
    checkpoint = read_checkpoint("tiny", source, "again", is_foreign=True)
    for piece in exports.begin(checkpoint, ("plain",), tmp_path / "exports", 4.0):
        exports.export.fn(piece, checkpoint, tmp_path / "exports", 4.0)
    assert not (tmp_path / "exports/plain/README.md").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer_config.json", b'{"chat_template": "\xff"}', r"tokenizer_config.json is not UTF-8 \(byte 19 is"),
        ("generation_config.json", b'{"eos_token_id": [true, 257]}', "generation_config.json: eos_token_id is no"),
        ("generation_config.json", b'{"pad_token_id": false}', "generation_config.json: pad_token_id is no"),
        (os.fsdecode(b"tokenizer-\xe9.json"), b"{}", "is no name in UTF-8"),
    ],
)
def test_a_wrong_side_file_ends_the_stage_before_the_copy(
    name: str, content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    save_tokenizer(source)
    (source / name).write_bytes(content)

    def no_copy(*_: Any) -> None:
        raise AssertionError("the copy began")

    monkeypatch.setattr("tasks.prepare_parent._write_tensors", no_copy)
    with pytest.raises(InputError, match=reason):
        prepare_parent.fn(tiny_params(prepare_parent={"source": str(source)}), Paths(tmp_path / "artifacts"))
