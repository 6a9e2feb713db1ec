"""The one check of weights: what no config.json announces, or is no weight, is refused by the parent and by exports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from storage.files import InputError, read_json, write_json
from storage.model_config import EMBEDDING, LM_HEAD
from storage.parent import Parent
from storage.paths import Paths
from tasks.checkpoints import exports
from tasks.checkpoints.exports import read_checkpoint
from tasks.prepare_parent import prepare_parent
from tests.settings import tiny_params
from tests.tiny import save_tiny, save_tokenizer

Tensors = dict[str, Tensor]
Raw = dict[str, Any]
Change = Callable[[Raw, Tensors], object]
Reader = Callable[[Path, Path], None]
INDEX = "model.safetensors.index.json"
UP, QUERY = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
FP8 = torch.float8_e4m3fn


def as_parent(source: Path, root: Path) -> None:
    """Take the checkpoint as prepare_parent does."""
    prepare_parent.fn(tiny_params(prepare_parent={"source": str(source)}), Paths(root / "artifacts"))


def as_export(source: Path, root: Path) -> None:
    """Export the checkpoint as `puzzle export` does."""
    checkpoint = read_checkpoint("tiny", source, "the download again", is_foreign=True)
    for piece in exports.begin(checkpoint, ("plain",), root / "exports", 4.0):
        exports.export.fn(piece, checkpoint, root / "exports", 4.0)


READERS: list[Reader] = [as_parent, as_export]


def change_checkpoint(folder: Path, change: Change) -> None:
    """Change config.json and tensors of a checkpoint, which becomes one file."""
    raw = read_json(folder / "config.json", "")
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    change(raw, tensors)
    write_json(folder / "config.json", raw)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_value(name: str, value: float) -> Change:
    def change(_: Raw, tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    return change


def in_fp8(_: Raw, tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].to(FP8)
    tensors[f"{UP}_scale"] = torch.ones(1)


def adding(name: str, tensor: Tensor | None = None) -> Change:
    return lambda _, tensors: tensors.update({name: torch.ones(8) if tensor is None else tensor})


def without_attention_bias(**fields: object) -> Change:
    return lambda raw, _: [raw.pop("attention_bias"), raw.update(fields)]


REFUSED: dict[str, tuple[Change, str]] = {
    "fp8 with scales": (in_fp8, rf"model.safetensors: tensor {UP} is of type F8_E4M3, expected float16, bfloat16 or"),
    "fp8 to the letter": (
        lambda _, tensors: tensors.update({name: tensor.to(FP8) for name, tensor in tensors.items()}),
        "is of type F8_E4M3, expected float16, bfloat16 or float32; take the checkpoint before it was quantised",
    ),
    "int8": (lambda _, tensors: tensors.update({UP: tensors[UP].to(torch.int8)}), f"tensor {UP} is of type I8"),
    "float64": (lambda _, tensors: tensors.update({UP: tensors[UP].double()}), f"tensor {UP} is of type F64"),
    "scales alone": (adding(f"{UP}_scale"), f"does not ask for tensor {UP}_scale; it is part of quantised weights"),
    "zero points": (adding("model.layers.1.mlp.up_proj.qzeros"), "it is part of quantised weights"),
    "biases not announced": (without_attention_bias(), r"self_attn.*bias and 11 more; the bias would be left out"),
    "biases by another key": (without_attention_bias(qkv_bias=True, use_bias=True), "the bias would be left out"),
    "a LoRA": (adding(f"{UP}.lora_A.weight"), "merge the adapter into the weights first"),
    "qk-norm": (adding("model.layers.0.self_attn.q_norm.weight"), "it normalises queries and keys"),
    "a block too many": (adding("model.layers.3.mlp.up_proj.weight"), "take a config.json that describes all tensors"),
    "one missing": (
        lambda _, tensors: tensors.pop(UP),
        f"lacks tensor {UP}, which config.json asks for; run the down",
    ),
    "another shape": (
        lambda _, tensors: tensors.update({UP: torch.ones(95, 48)}),
        r"has shape \(95, 48\), config.json ",
    ),
    "another head": (lambda raw, _: raw.update(tie_word_embeddings=True), "embeddings are tied, and lm_head.weight is"),
    "quantised": (lambda raw, _: raw.update(quantization_config={"bits": 4}), "the checkpoint is quantised"),
    "compressed": (lambda raw, _: raw.update(compression_config={"format": "x"}), "the checkpoint is quantised"),
    "another file": (lambda raw, _: raw.update(transformers_weights="new.safetensors"), "transformers_weights"),
    "NaN": (with_value(UP, float("nan")), f"model.safetensors: tensor {UP} holds NaN or infinite values"),
    "infinite": (with_value("model.norm.weight", float("-inf")), "tensor model.norm.weight holds NaN or infinite"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", REFUSED)
def test_no_reader_takes_other_weights_than_config_json_says(case: str, reader: Reader, tmp_path: Path) -> None:
    """Once scales and biases were dropped without a word, and the logits were off by 1.3 of the largest."""
    source = tmp_path / "source"
    save_tiny("llama3-untied-head_dim-bias", source)
    save_tokenizer(source)
    change, reason = REFUSED[case]
    change_checkpoint(source, change)
    with pytest.raises(InputError, match=reason):
        reader(source, tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_an_adapter_beside_the_weights_is_refused(reader: Reader, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "source")
    (tmp_path / "source/adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config.json: transformers would add this adapter .* merge it"):
        reader(tmp_path / "source", tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_harmless_is_left_out(reader: Reader, tmp_path: Path) -> None:
    """Rotary frequencies as checkpoints of 2023 hold them, and a head that is the tied embedding once more."""

    def change(_: Raw, tensors: Tensors) -> None:
        tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(6)
        tensors[LM_HEAD] = tensors[EMBEDDING].clone()

    source = tmp_path / "source"
    model, _ = save_tiny("llama", source)
    save_tokenizer(source)
    change_checkpoint(source, change)
    reader(source, tmp_path)
    [file] = (path for path in tmp_path.rglob("model.safetensors") if source not in path.parents)
    written = load_file(file)
    assert written.keys() == model.state_dict().keys() - {LM_HEAD}
    assert all(torch.equal(written[name], model.state_dict()[name]) for name in written)


def test_the_file_that_transformers_reads_counts(tmp_path: Path) -> None:
    """A new model.safetensors stands beside an older index and its shards."""
    source = tmp_path / "source"
    save_tiny("llama", source)
    save_tokenizer(source)
    new = {name: tensor + 1 for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(new, source / "model.safetensors", {"format": "pt"})
    theirs: Any = AutoModelForCausalLM.from_pretrained(source)
    as_parent(source, tmp_path)
    checkpoint = Parent(tmp_path / "artifacts/parent").checkpoint
    for name, tensor in theirs.state_dict().items():
        assert name == LM_HEAD or torch.equal(checkpoint.tensor(name), tensor)


def without_a_name(source: Path, index: Raw) -> None:
    del index["weight_map"][UP]


def in_two_shards(source: Path, index: Raw) -> None:
    first, second = (source / index["weight_map"][name] for name in (UP, QUERY))
    save_file({**load_file(second), UP: load_file(first)[UP] + 1}, second, {"format": "pt"})


def outside(place: str) -> Callable[[Path, Raw], None]:
    def change(source: Path, index: Raw) -> None:
        shard = source / index["weight_map"][UP]
        shard.rename(source.parent / shard.name)
        if place == "link":
            shard.symlink_to(source.parent / shard.name)
        else:
            name = f"../{shard.name}" if place == "dots" else str(source.parent / shard.name)
            index["weight_map"] |= {key: name for key, file in index["weight_map"].items() if file == shard.name}

    return change


SHARDS: dict[str, tuple[Callable[[Path, Raw], None], str]] = {
    "a tensor that the index lacks": (
        without_a_name,
        rf"the checkpoint lacks tensor {UP}, which config.json asks for",
    ),
    "a tensor in two shards": (in_two_shards, rf"lacks or has in another file: \['{UP}'\]"),
    "dots": (outside("dots"), rf"{INDEX} names '../model-.*', which is no file in "),
    "an absolute path": (outside("absolute"), rf"{INDEX} names '/.*, which is no file in "),
    "a link": (outside("link"), r"model-0.*safetensors leads out of .*source; copy the file there"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", SHARDS)
def test_shards_hold_what_the_index_says_and_lie_in_the_folder(case: str, reader: Reader, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama", source)
    change, reason = SHARDS[case]
    index = json.loads((source / INDEX).read_text())
    change(source, index)
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=reason):
        reader(source, tmp_path)


def test_ten_thousand_blocks_are_read_from_headers(tmp_path: Path) -> None:
    """As many as a config.json may name; the tensors of one shard were once opened one by one."""
    save_tiny("llama", tmp_path)
    change_checkpoint(tmp_path, lambda raw, _: raw.update(num_hidden_layers=10_000))
    with pytest.raises(InputError, match=r"lacks tensor model.layers.3.input_layernorm.weight and 89972 more"):
        read_checkpoint("tiny", tmp_path, "the download again", is_foreign=True)
