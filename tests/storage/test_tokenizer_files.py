"""Tokenizers of others: malformed, without end, or with code of their own; each is one sentence, or what it was."""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from storage import tokenizer_probe
from storage.files import InputError, write_json
from storage.gguf_tokenizer import add_tokenizer
from storage.parent import Parent
from storage.paths import Paths
from storage.tokenizer import load_tokenizer
from storage.tokenizer_files import check_tokenizer
from tasks.prepare_parent import prepare_parent
from tests.settings import tiny_params
from tests.tiny import save_tiny, save_tokenizer

CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).write_text("was run")
class Own(PreTrainedTokenizerFast):
    pass
class OwnModel(LlamaForCausalLM):
    pass
"""


def with_code(source: Path, file: str, **auto_map: Any) -> Path:
    """Write a tiny parent whose `file` asks for classes of its own; return what their code would write."""
    save_tiny("llama", source)
    save_tokenizer(source)
    (source / "own.py").write_text(CODE.format(marker=str(source / "marker")))
    values = json.loads((source / file).read_text())
    write_json(source / file, {**values, "auto_map": auto_map})
    return source / "marker"


def bring(source: Path, root: Path) -> Parent:
    paths = Paths(root / "artifacts")
    prepare_parent.fn(tiny_params(prepare_parent={"source": str(source)}), paths)
    return Parent(paths.parent)


@pytest.fixture(params=["nobody there", "yes"])
def nobody_is_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close stdin, or let it say yes to everything; a question fails the test."""

    def ask(question: str = "") -> str:
        pytest.fail(f"asked: {question}")

    monkeypatch.setattr(builtins, "input", ask)
    if request.param == "nobody there":
        monkeypatch.setattr(sys, "stdin", None)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.usefixtures("nobody_is_asked")
def test_a_tokenizer_with_code_of_its_own_is_one_sentence(file: str, tmp_path: Path) -> None:
    """It asked "Do you wish to run the custom code?" in mid-stage, and `yes |` ran it."""
    marker = with_code(tmp_path / "source", file, AutoTokenizer=["own.Own", "own.Own"])
    refusal = rf"{file} asks for a tokenizer class of its own \(auto_map\), whose code is"
    with pytest.raises(InputError, match=refusal):
        bring(tmp_path / "source", tmp_path)
    with pytest.raises(InputError, match=refusal):
        load_tokenizer(tmp_path / "source", "")
    assert not marker.exists()


@pytest.mark.usefixtures("nobody_is_asked")
def test_code_of_the_model_stays_behind(tmp_path: Path) -> None:
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.OwnModel"}
    marker = with_code(tmp_path / "source", "config.json", **classes)
    parent = bring(tmp_path / "source", tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(parent.folder)).__module__.startswith("transformers.")
    assert not marker.exists() and not list(parent.folder.glob("*.py"))
    assert "auto_map" not in json.loads((parent.folder / "config.json").read_text())


def test_a_parent_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer for a Qwen2, of which every text has no tokens."""
    save_tiny("qwen2", tmp_path / "source")
    with pytest.raises(InputError, match=r"source has no tokenizer \(tokenizer.json, tokenizer.model or vocab.json\)"):
        bring(tmp_path / "source", tmp_path)


def spoiled(folder: Path, **changes: Any) -> Path:
    """Return the tokenizer of save_tokenizer with other parts of tokenizer.json."""
    save_tokenizer(folder)
    path = folder / "tokenizer.json"
    write_json(path, {**json.loads(path.read_text()), **changes})
    return path


def test_a_regular_expression_without_end_is_one_sentence(tmp_path: Path) -> None:
    """The library panics on it, which is no Exception, and fills the screen with Rust."""
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$|(-+)+$"}, "behavior": "Isolated", "invert": False}
    spoiled(tmp_path, pre_tokenizer=pattern)
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer \(.*retry-limit-in-match over\); save it"):
        check_tokenizer(tmp_path, "again")


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SAME = {"type": "Replace", "pattern": {"String": "z"}, "content": "z"}


@pytest.mark.parametrize(
    ("normalizers", "seconds", "memory"),
    [([DOUBLE] * 12 + [SAME] * 2_000, 1, 1 << 30), ([DOUBLE] * 40, 8, 1 << 28)],
    ids=["time", "memory"],
)
def test_a_bomb_ends_a_process_of_its_own_and_is_one_sentence(
    normalizers: list[Any], seconds: int, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small limits, so that both are reached soon: a text of 4 million letters again and again, one of 10 ** 14."""
    monkeypatch.setattr(tokenizer_probe, "CPU_SECONDS", seconds)
    monkeypatch.setattr(tokenizer_probe, "MEMORY_BYTES", memory)
    spoiled(tmp_path, normalizer={"type": "Sequence", "normalizers": normalizers})
    expected = (
        rf"tokenizer.json is not a tokenizer \(reading it takes more than {seconds} s or {memory / 2**30:g} GiB\)"
    )
    with pytest.raises(InputError, match=expected):
        check_tokenizer(tmp_path, "again")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% generation %}{{ bos_token + 'a' * 10000000000 }}{% endgeneration %}",
        "{{ 'a' * 3000000 }}",
    ],
    ids=["time", "memory", "length"],
)
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_without_end_is_one_sentence(
    template: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hung write_text and prepare_corpus, or took all memory."""
    monkeypatch.setattr(tokenizer_probe, "CPU_SECONDS", 1)
    save_tokenizer(tmp_path)
    named = [{"name": "default", "template": "{{ messages }}"}, {"name": "tools", "template": template}]
    text = template if place.endswith("jinja") else json.dumps({"chat_template": named})
    (tmp_path / place).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"its chat template takes more than 1 s or 1 GiB for a short chat"):
        check_tokenizer(tmp_path, "again")


def test_a_tokenizer_that_cannot_encode_or_draws_lots_is_refused(tmp_path: Path) -> None:
    spoiled(tmp_path, model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"})
    with pytest.raises(InputError, match=r"has no tokenizer that can be read \(.*UNK"):
        load_tokenizer(tmp_path, "again")
    model = json.loads(spoiled(tmp_path).read_text())["model"]
    spoiled(tmp_path, model={**model, "dropout": 0.5})
    with pytest.raises(InputError, match="dropout gives a text other tokens each time"):
        load_tokenizer(tmp_path, "again")


def test_a_tokenizer_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with spoiled(tmp_path).open("r+b") as handle:
        handle.truncate(1 << 32)
    with pytest.raises(InputError, match=r"tokenizer.json is larger than 40 MiB"):
        check_tokenizer(tmp_path, "again")


def test_a_token_of_a_million_letters_is_refused(tmp_path: Path) -> None:
    """All of its parts were looked up, a million times a million."""
    vocabulary = json.loads(spoiled(tmp_path).read_text())["model"]["vocab"]
    spoiled(tmp_path, model={"type": "BPE", "vocab": {**vocabulary, "a" * 1_000_000: 260}, "merges": []})
    with pytest.raises(InputError, match=r"expected tokens as long as words, found some of 1,000,000 characters"):
        add_tokenizer(GGUFWriter(None, "llama"), tmp_path, 272)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


def _changed(value: Any, data: st.DataObject) -> Any:
    """Return a JSON value of which one part, wherever in it, is another."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        copy: Any = value.copy()
        copy[key] = _changed(value[key], data)
        return copy
    return data.draw(_JSON)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(file=st.sampled_from(_FILES), data=st.data())
def test_any_change_of_a_file_is_a_tokenizer_or_one_sentence(
    file: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzzed")
    save_tokenizer(folder)
    path = folder / file
    value = json.loads(path.read_text()) if path.exists() else {"eos_token_id": 257, "bos_token": "<s>"}
    path.write_text(json.dumps(_changed(value, data)), encoding="utf-8")
    for read in (
        lambda: add_tokenizer(GGUFWriter(None, "llama"), folder, 272),
        lambda: load_tokenizer(folder, "again"),
    ):
        try:
            read()
        except InputError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
