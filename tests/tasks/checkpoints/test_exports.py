"""Exports: every format computes what the child computes and comes back as it was; broken checkpoints are refused."""

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen3ForCausalLM

from storage.block_configs import to_anymodel
from storage.files import DamagedFileError, InputError, read_json, read_sealed, write_json
from storage.formats import FORMATS, FormatName
from storage.model_config import EMBEDDING, ModelConfig
from storage.nemotron_nas import to_nemotron_nas
from storage.pieces import Pieces
from storage.sections import Run
from storage.variants import Attention, Ffn
from tasks.checkpoints import exports
from tasks.checkpoints.export_quality import compare_files, export_quality
from tasks.checkpoints.exports import CheckpointToExport, ExportsOverview, read_checkpoint
from tasks.checkpoints.gguf_files import GgufFile, whole
from tasks.puzzle.model.child import DeciLMForCausalLM
from tasks.puzzle.runtimes.rules import format_refusals
from tests.clone import ROOT
from tests.tiny import FAMILIES, LLAMA3_ROPE, flip_byte, random_child, save_child, save_tiny, save_tokenizer

FULL, ONE, NO_ATTENTION, LINEAR = Attention("gqa", 2), Attention("gqa", 1), Attention("no_op"), Attention("linear")
WIDE, NARROW, NO_FFN, LINEAR_FFN = Ffn("gated", 96), Ffn("gated", 40), Ffn("no_op"), Ffn("linear")
Blocks = Sequence[tuple[Attention, Ffn]]
MIXED: Blocks = [(FULL, WIDE), (ONE, NARROW), (NO_ATTENTION, WIDE), (FULL, NO_FFN), (LINEAR, WIDE)]
NO_LINEAR = MIXED[:-1]
LOGITS_ERROR = 2e-5
"""float32 sums in another order, of logits of about 10; exact zeros add nothing."""


def geometry(family: str, folder: Path) -> ModelConfig:
    """Return the geometry of a tiny parent, with a vocabulary that byte-level tokenizers fit in."""
    _, config = save_tiny(family, folder)
    return replace(config, vocab_size=272)


def write(
    source: CheckpointToExport, folder: Path, *formats: FormatName, max_shard_gib: float = 4.0
) -> ExportsOverview:
    """Export as the flow does."""
    exports.check(source, formats, "export_child.formats")
    for piece in exports.begin(source, formats, folder, max_shard_gib):
        exports.export.fn(piece, source, folder, max_shard_gib)
    return exports.write_overview(source, formats, folder)


def logits(model: Any, vocabulary: int) -> Tensor:
    """Return the logits of a fixed text."""
    tokens = torch.randint(vocabulary, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        computed: Tensor = model(input_ids=tokens).logits
    return computed


def loaded(kind: Any, folder: Path) -> Any:
    """Return a model that transformers loads; no tensor is missing, left over or of another shape."""
    model, problems = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(problems.values()), problems
    return model


# --- every format computes the same ----------------------------------------------------------------------------------

_ATTENTIONS = st.sampled_from([FULL, ONE, Attention("gqa", 4), NO_ATTENTION])
_FFNS = st.sampled_from([WIDE, NARROW, Ffn("gated", 33), NO_FFN])


@settings(max_examples=40, deadline=None)
@given(blocks=st.lists(st.tuples(_ATTENTIONS, _FFNS), min_size=1, max_size=5), family=st.sampled_from(FAMILIES))
def test_transformers_own_class_loads_the_padded_export(
    blocks: Blocks, family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("padded")
    config = geometry(family, folder / "parent")
    child = save_child(folder / "child", config, blocks)
    form = "padded-qwen3" if config.qk_norm else "padded-llama"
    write(read_checkpoint("tiny", folder / "child", "again"), folder / "exports", form)
    model = loaded(Qwen3ForCausalLM if config.qk_norm else LlamaForCausalLM, folder / "exports" / form)
    torch.testing.assert_close(logits(model, 272), logits(child, 272), atol=LOGITS_ERROR, rtol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_child_whose_blocks_are_alike_is_a_plain_model_of_its_family(family: str, tmp_path: Path) -> None:
    config = geometry(family, tmp_path / "parent")
    child = save_child(tmp_path / "child", config, [(ONE, NARROW)] * 2)
    source = read_checkpoint("tiny", tmp_path / "child", "again")
    source = replace(source, config=replace(source.config, architecture=config.architecture))  # as export_child does
    write(source, tmp_path / "exports", "plain")
    model = loaded(AutoModelForCausalLM, tmp_path / "exports/plain")
    assert type(model).__name__ == config.architecture
    torch.testing.assert_close(logits(model, 272), logits(child, 272), atol=LOGITS_ERROR, rtol=0.0)
    assert AutoTokenizer.from_pretrained(tmp_path / "exports/plain")("ab")["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_nemotron_nas_comes_back_byte_for_byte(family: str, tmp_path: Path) -> None:
    """Through our loader, in several shards: config, index, checksums, code, tokenizer and all."""
    child = save_child(tmp_path / "child", geometry(family, tmp_path / "parent"), MIXED)
    small = 60_000 / 2**30
    write(read_checkpoint("tiny", tmp_path / "child", "again"), tmp_path / "a", "nemotron-nas", max_shard_gib=small)
    first = tmp_path / "a/nemotron-nas"
    write(read_checkpoint("tiny", first, "again"), tmp_path / "b", "nemotron-nas", max_shard_gib=small)
    files = sorted(path.relative_to(first) for path in first.rglob("*"))
    assert [str(path) for path in files if path.suffix == ".safetensors"][1:], "one shard shows no order"
    for path in files:
        assert (tmp_path / "b/nemotron-nas" / path).read_bytes() == (first / path).read_bytes(), path
    model = AutoModelForCausalLM.from_pretrained(first)
    assert isinstance(model, DeciLMForCausalLM)
    assert torch.equal(logits(model, 272), logits(child, 272))
    config = read_json(first / "config.json", "")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (256, 257, 258)
    for target in config["auto_map"].values():
        module, _, name = target.partition(".")
        assert f"class {name}(" in (first / f"{module}.py").read_text(encoding="utf-8")


def as_modelopt_builds_it(folder: Path) -> Any:
    """Return transformers' model of an AnyModel's family, built and loaded as ModelOpt's patcher of layers does.

    Every layer is made from config.json with the sizes that its entry in `block_configs` has; a half that is no-op
    passes nothing on, and has neither norm nor weights.
    """
    raw = read_json(folder / "config.json", "")
    [architecture], listed = raw.pop("architectures"), raw.pop("block_configs")
    assert (architecture, raw.pop("per_layer_config") != {}) == ("AnyModel", True)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config.architectures = [raw["base_architecture"]]
    model: Any = AutoModelForCausalLM.from_config(config)
    for index, block in enumerate(listed):
        own, attention, ffn = copy.deepcopy(config), block["attention"], block["ffn"]
        own.num_key_value_heads = attention["num_key_value_heads"] or own.num_key_value_heads
        own.intermediate_size = ffn["intermediate_size"] or own.intermediate_size
        layer = type(model.model.layers[index])(own, index)
        if attention["no_op"]:
            layer.input_layernorm, layer.self_attn = nn.Identity(), Nothing()
        if ffn["no_op"]:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), nn.Sequential(Nothing(), First())
        model.model.layers[index] = layer
    tensors = load_file(folder / "model.safetensors")
    left = model.load_state_dict(tensors, strict=False)
    assert (left.unexpected_keys, set(left.missing_keys) - {"lm_head.weight"}) == ([], set())
    model.tie_weights()
    return model.train(False)


class Nothing(nn.Module):
    """A half of a block that adds nothing, with the weights that an attention returns beside it."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class First(nn.Module):
    """The first of two values, as an FFN returns it."""

    def forward(self, values: tuple[Tensor, None]) -> Tensor:
        return values[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [NO_LINEAR, [(NO_ATTENTION, NARROW), (NO_ATTENTION, NO_FFN)]], ids=["mixed", "none"])
def test_an_anymodel_is_computed_by_layers_of_its_family_and_comes_back(
    family: str, blocks: Blocks, tmp_path: Path
) -> None:
    config = geometry(family, tmp_path / "parent")
    child = save_child(tmp_path / "child", config, blocks)
    source = read_checkpoint("tiny", tmp_path / "child", "again")
    source = replace(source, config=replace(source.config, architecture=config.architecture))  # as export_child does
    write(source, tmp_path / "exports", "anymodel")
    folder = tmp_path / "exports/anymodel"
    torch.testing.assert_close(
        logits(as_modelopt_builds_it(folder), 272), logits(child, 272), atol=LOGITS_ERROR, rtol=0.0
    )
    again = read_checkpoint("tiny", folder, "again", is_foreign=True)
    assert (again.blocks, again.config) == (tuple(blocks), source.config)


def test_the_card_says_how_to_load_each_format(tmp_path: Path) -> None:
    """The section replaces that of the child's own card; the rest stays, also when an export is exported again."""
    save_child(tmp_path / "child", geometry("llama", tmp_path / "parent"), NO_LINEAR)
    card = "# Tiny\n\nA child.\n\n## Load it\n\nimport ours\n\n## Provenance\n\n- parent: it\n"
    (tmp_path / "child/README.md").write_text(card)
    source = read_checkpoint("tiny", tmp_path / "child", "again")
    write(source, tmp_path / "exports", "nemotron-nas", "padded-llama", "gguf-f16")
    words = {"nemotron-nas": "trust_remote_code=True", "padded-llama": "a plain Llama", "gguf-f16": "llama-server -m"}
    for name, words_of_format in words.items():
        text = (tmp_path / "exports" / name / "README.md").read_text(encoding="utf-8")
        assert words_of_format in text and "import ours" not in text
        assert text.startswith("# Tiny\n\nA child.\n\n## Load it\n")
        assert text.endswith("\n\n## Provenance\n\n- parent: it\n")
    write(read_checkpoint("tiny", tmp_path / "exports/nemotron-nas", "again"), tmp_path / "b", "nemotron-nas")
    cards = [tmp_path / folder / "nemotron-nas/README.md" for folder in ("exports", "b")]
    assert cards[0].read_bytes() == cards[1].read_bytes()


def foreign(folder: Path) -> tuple[DeciLMForCausalLM, Blocks]:
    """Write a checkpoint as others publish them: head_dim 128, untied, llama3 rope, fields that ours has not."""
    rope = {**LLAMA3_ROPE, "rope_theta": 500000.0}
    config = ModelConfig(
        **{**vars(geometry("llama", folder.parent / "for_sizes")), "hidden_size": 192, "num_heads": 2, "head_dim": 128},
    )
    config = replace(config, num_kv_heads=2, tie_embeddings=False, rope=rope)
    blocks: Blocks = [(FULL, Ffn("gated", 256)), (ONE, Ffn("gated", 512)), (NO_ATTENTION, Ffn("gated", 256))]
    model = random_child(config, blocks)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    raw = to_nemotron_nas(config, blocks, {"bos_token_id": 256, "eos_token_id": [257, 258]}, "float32")
    sinks = {"num_sink_tokens": None, "window_length": None, "sparsify": None, "unshifted_sink": False}
    for block in raw["block_configs"]:
        block["attention"] |= sinks | {"use_prefill_window_in_sink_attention": False}
        block["ffn"] |= {"sparsify": None}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    raw |= {"rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "float32", "use_cache": True}
    raw |= {"transformers_version": "4.44.2", "pretraining_tp": 1, "initializer_range": 0.02, "attention_dropout": 0.0}
    for ours in ("rope_parameters", "qkv_bias", "dtype"):
        raw.pop(ours)
    write_json(folder / "config.json", raw)
    return model, blocks


def test_a_foreign_checkpoint_loads_and_exports(tmp_path: Path) -> None:
    model, blocks = foreign(tmp_path / "theirs")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), 272), logits(model, 272))
    source = read_checkpoint("theirs", tmp_path / "theirs", "again", is_foreign=True)
    assert list(source.blocks) == blocks
    assert (source.config.head_dim, source.config.rope["rope_type"], source.config.tie_embeddings) == (
        128,
        "llama3",
        False,
    )
    write(source, tmp_path / "exports", "nemotron-nas", "padded-llama")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    ours = load_file(tmp_path / "exports/nemotron-nas/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_json(tmp_path / "exports/nemotron-nas/config.json", "")["eos_token_id"] == [257, 258]
    padded = LlamaForCausalLM.from_pretrained(tmp_path / "exports/padded-llama")
    torch.testing.assert_close(logits(padded, 272), logits(model, 272), atol=LOGITS_ERROR, rtol=0.0)


def test_a_foreign_checkpoint_evaluates(tmp_path: Path) -> None:
    """As evaluate_child does with a child's: block by block in torch, and its GGUF in llama.cpp."""
    model, _ = foreign(tmp_path / "theirs")
    save_tokenizer(tmp_path / "theirs")
    source = read_checkpoint("theirs", tmp_path / "theirs", "again", is_foreign=True)
    write(source, tmp_path / "exports", "gguf-f32")
    tokens = torch.randint(272, (2, 48), generator=torch.Generator().manual_seed(5))
    run = Run(seed=0, dtype="float32", device="cpu", threads=1, workers=1)
    files: dict[FormatName, Path] = {"gguf-f32": tmp_path / "exports/gguf-f32/theirs-F32.gguf"}
    quality = export_quality("gguf-f32", [compare_files(files, source.checkpoint, tokens, run)], [0, 1])
    with torch.inference_mode():
        loss = functional.cross_entropy(model(input_ids=tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:])
    assert math.log(quality.torch_perplexity) == pytest.approx(loss.item(), abs=1e-5)
    assert math.log(quality.perplexity) == pytest.approx(loss.item(), abs=1e-3)
    assert 0 <= quality.kl < 1e-5  # keys and values are F16 in llama.cpp


def test_a_child_in_16_bit_is_padded_in_16_bit(tmp_path: Path) -> None:
    """A block that was removed is padded as well, of which the checkpoint has no tensor."""
    save_child(tmp_path / "child", geometry("llama", tmp_path / "parent"), [(FULL, WIDE), (NO_ATTENTION, NO_FFN)])
    tensors = {
        name: tensor.bfloat16()
        for file in (tmp_path / "child").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # as checkpoints of 2023 keep it
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(tensors, theirs / "model.safetensors")
    shutil.copyfile(tmp_path / "child/config.json", theirs / "config.json")
    write(read_checkpoint("theirs", theirs, "again", is_foreign=True), tmp_path / "exports", "padded-llama")
    padded = load_file(tmp_path / "exports/padded-llama/model.safetensors")
    assert {tensor.dtype for tensor in padded.values()} == {torch.bfloat16}
    assert not any("rotary" in name for name in padded)


def test_weights_beside_a_float16_embedding_are_not_said_to_be_float16(tmp_path: Path) -> None:
    """A weight of 1e6 became infinite, as transformers loads a checkpoint in config.json's dtype."""
    save_child(tmp_path / "child", geometry("llama", tmp_path / "parent"), [(FULL, WIDE), (FULL, WIDE)])
    files = (tmp_path / "child").glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    tensors[EMBEDDING] = tensors[EMBEDDING].half()
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(tensors, theirs / "model.safetensors")
    shutil.copyfile(tmp_path / "child/config.json", theirs / "config.json")
    write(read_checkpoint("theirs", theirs, "again", is_foreign=True), tmp_path / "exports", "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exports/plain", trust_remote_code=False)
    assert model.model.layers[1].mlp.up_proj.weight[0, 0].item() == 1e6


def test_an_output_bias_alone_is_a_llama_only_with_zero_ones_beside_it(tmp_path: Path) -> None:
    config = replace(geometry("llama", tmp_path / "parent"), output_bias=True)
    child = save_child(tmp_path / "child", config, [(FULL, WIDE)] * 2)
    source = read_checkpoint("tiny", tmp_path / "child", "again")
    with pytest.raises(InputError, match=r"output projection alone has a bias.*export it as padded-llama"):
        write(source, tmp_path / "exports", "plain")
    write(source, tmp_path / "exports", "padded-llama")
    model = loaded(LlamaForCausalLM, tmp_path / "exports/padded-llama")
    torch.testing.assert_close(logits(model, 272), logits(child, 272), atol=LOGITS_ERROR, rtol=0.0)


# --- what is refused -------------------------------------------------------------------------------------------------


Raw = dict[str, Any]
Tensors = dict[str, Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"  # block 2 has no attention
LIES: dict[str, tuple[Callable[[Raw, Tensors], object], str]] = {
    "a tensor is gone": (
        lambda _, tensors: tensors.pop("model.norm.weight"),
        r"the checkpoint lacks tensor model.norm.weight, which config.json asks for",
    ),
    "a tensor too many": (
        lambda _, tensors: tensors.update({QUERY: torch.zeros(1)}),
        rf"model.safetensors: config.json does not ask for tensor {QUERY}; take a config.json",
    ),
    "another width": (
        lambda _, tensors: tensors.update({UP: tensors[UP][:256].clone()}),
        rf"{UP} has shape \(256, 192\), config.json asks for \(512, 192\)",
    ),
    "tied, it says": (
        lambda raw, _: raw.update(tie_word_embeddings=True),
        r"says that the embeddings are tied, and lm_head.weight is another tensor",
    ),
    "a window": (
        lambda raw, _: raw["block_configs"][0]["attention"].update(window_length=8),
        r"block_configs.0..attention: window_length is 8, which is not supported, expected null",
    ),
    "quantised": (lambda raw, _: raw.update(quantization_config={"quant_method": "fp8"}), r"checkpoint is quantised"),
    "no block_configs": (lambda raw, _: raw.pop("block_configs"), r"not a nemotron-nas config.json"),
    "a group of no heads": (
        lambda raw, _: raw["block_configs"][0]["attention"].update(n_heads_in_group=0),
        r"not a nemotron-nas config.json: block_configs.0..attention: n_heads_in_group is 0, expected a whole",
    ),
    "no number of blocks": (
        lambda raw, _: raw.update(num_hidden_layers="3"),
        r"num_hidden_layers is '3', expected a whole number",
    ),
    "no scale": (
        lambda raw, _: raw["rope_scaling"].pop("factor"),
        r"rope parameters of type llama3 must have numbers above 0 for factor",
    ),
    "no angle": (
        lambda raw, _: raw.update(rope_theta=None),
        r"must have numbers above 0 for rope_theta",
    ),
    "words for a scale": (
        lambda raw, _: raw.update(rope_scaling="yarn"),
        r"rope_scaling is 'yarn', expected an object",
    ),
    "too few blocks": (lambda raw, _: raw["block_configs"].pop(), r"num_hidden_layers is 3 but block_configs has 2"),
    "another family": (
        lambda raw, _: [raw.pop("block_configs"), raw.update(architectures=["Olmo2ForCausalLM"])],
        r"Olmo2ForCausalLM is not supported: it normalises after each subblock",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_checkpoint_is_one_error(lie: str, tmp_path: Path) -> None:
    foreign(tmp_path / "theirs")
    change, expected = LIES[lie]
    raw, tensors = read_json(tmp_path / "theirs/config.json", ""), load_file(tmp_path / "theirs/model.safetensors")
    change(raw, tensors)
    write_json(tmp_path / "theirs/config.json", raw)
    save_file(tensors, tmp_path / "theirs/model.safetensors")
    with pytest.raises(InputError, match=expected):
        read_checkpoint("theirs", tmp_path / "theirs", "the download again", is_foreign=True)


def test_a_checkpoint_in_pieces_is_one_error(tmp_path: Path) -> None:
    foreign(tmp_path / "theirs")
    weights = tmp_path / "theirs/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"is not a whole safetensors file .*; run the download again"):
        read_checkpoint("theirs", tmp_path / "theirs", "the download again", is_foreign=True)
    (tmp_path / "theirs/config.json").unlink()
    with pytest.raises(InputError, match=r"has no config.json; expected a checkpoint folder"):
        read_checkpoint("theirs", tmp_path / "theirs", "the download again", is_foreign=True)


def test_a_flipped_byte_is_found_and_leaves_no_export(tmp_path: Path) -> None:
    save_child(tmp_path / "child", geometry("llama", tmp_path / "parent"), NO_LINEAR)
    source = read_checkpoint("tiny", tmp_path / "child", "dvc repro distill_child@tiny")
    flip_byte(sorted((tmp_path / "child").glob("*.safetensors"))[-1])
    for name in FORMATS:
        if format_refusals(name, source.config, source.blocks):
            continue
        with pytest.raises(DamagedFileError, match=r"is damaged: .* differs; run `dvc repro distill_child@t"):
            write(source, tmp_path / "exports", name)
        assert not Pieces(tmp_path / "exports", "").names()
        assert not list((tmp_path / "exports").rglob("*.gguf"))


def test_what_would_be_computed_wrong_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = geometry("llama", tmp_path / "parent")
    blocks = [(FULL, WIDE), (LINEAR, WIDE), (FULL, LINEAR_FFN)]
    save_child(tmp_path / "child", config, blocks)
    source = read_checkpoint("like-51b", tmp_path / "child", "again")
    refused: dict[FormatName, str] = {
        "plain": r"plain: its blocks differ \(export it as padded-llama\); or take plain out of export_child.formats",
        "padded-llama": r"a Llama has no linear layer, unlike blocks 1, 2 \(export it as nemotron-nas",
        "anymodel": r"what reads an anymodel has no linear layer, unlike blocks 1, 2 \(export it as nemotron-nas",
        "gguf-q8_0": r"gguf-q8_0: it has no linear FFN, unlike block 2 \(name the runtime in the target's `runtimes`\)",
    }
    for name, expected in refused.items():
        with pytest.raises(InputError, match=expected):
            write(source, tmp_path / "exports", name)
    assert not (tmp_path / "exports").exists()
    write(source, tmp_path / "exports", "nemotron-nas")


def test_exports_never_take_the_place_of_something_else(tmp_path: Path) -> None:
    """What they do not know in their folder goes, so all of it must be theirs, and of the same checkpoint."""
    config = geometry("llama", tmp_path / "parent")
    for name, blocks in (("child", NO_LINEAR), ("other", [(FULL, WIDE)])):
        save_child(tmp_path / name, config, blocks)
    source, other = (read_checkpoint("tiny", tmp_path / name, "again") for name in ("child", "other"))
    for out in (tmp_path, tmp_path / "child"):
        with pytest.raises(InputError, match=r"holds the checkpoint .*child; name another folder"):
            exports.exported(out, source)
    with pytest.raises(InputError, match=r"holds something else, LICENSE; move it, or name another folder"):
        exports.exported(tmp_path / "other", source)
    with pytest.raises(InputError, match=r"config.json cannot be made a folder"):
        exports.exported(tmp_path / "other/config.json", source)
    out = tmp_path / "out"
    assert exports.exported(out, source) == []
    write(source, out, "gguf-f16")
    assert exports.exported(out, source) == ["gguf-f16"]
    with pytest.raises(InputError, match=r"out holds exports of another checkpoint; name another folder"):
        exports.exported(out, other)
    (out / "gguf-f16/mine.gguf").write_text("precious")
    with pytest.raises(InputError, match=r"out holds something else, gguf-f16/mine.gguf; move it"):
        exports.exported(out, source)
    Pieces(tmp_path / "library", "").finish("block-000", "key", [])
    with pytest.raises(InputError, match=r"library holds exports of another checkpoint"):
        exports.exported(tmp_path / "library", source)


def test_an_export_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first was whole, and between its record and its rename; what it left is no stranger's."""
    save_child(tmp_path / "child", geometry("llama", tmp_path / "parent"), NO_LINEAR)
    source, out = read_checkpoint("tiny", tmp_path / "child", "again"), tmp_path / "out"
    for step in ("finish", "rename"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                Pieces if step == "finish" else Path, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            write(source, out, "gguf-f16")
        assert not (out / "gguf-f16").exists() and (out / ".gguf-f16").is_dir()
        assert exports.exported(out, source) == (["gguf-f16"] if step == "rename" else [])
    write(source, out, *exports.exported(out, source))
    assert sorted(path.name for path in out.iterdir()) == [".pieces", "exports.json", "gguf-f16"]


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_finished_formats_are_taken_as_they_are_and_others_go(tmp_path: Path) -> None:
    save_child(tmp_path / "child", geometry("llama", tmp_path / "parent"), NO_LINEAR)
    source, folder = read_checkpoint("tiny", tmp_path / "child", "again"), tmp_path / "exports"
    write(source, folder, "nemotron-nas", "gguf-f16", "gguf-q8_0")
    assert exports.begin(source, ("nemotron-nas", "gguf-f16"), folder, 4.0) == []
    assert not (folder / "gguf-q8_0").exists()
    flip_byte(folder / "gguf-f16/tiny-F16.gguf")
    [(left, key)] = exports.begin(source, ("nemotron-nas", "gguf-f16"), folder, 4.0)
    assert left == "gguf-f16"
    (folder / "gguf-f16").mkdir()
    (folder / "gguf-f16/.tiny-F16.gguf.killed").write_bytes(b"half")  # of a run that was killed
    exports.export.fn((left, key), source, folder, 4.0)
    assert sorted(path.name for path in (folder / "gguf-f16").iterdir()) == ["LICENSE", "tiny-F16.gguf"]
    other = replace(source, special_tokens={**source.special_tokens, "eos_token_id": 3})
    assert len(exports.begin(other, ("nemotron-nas", "gguf-f16"), folder, 4.0)) == 2


def test_the_overview_says_files_and_runtimes_and_what_is_damaged(tmp_path: Path) -> None:
    save_child(tmp_path / "child", geometry("llama", tmp_path / "parent"), NO_LINEAR)
    source, folder = read_checkpoint("tiny", tmp_path / "child", "again"), tmp_path / "exports"
    overview = write(source, folder, "nemotron-nas", "gguf-f16")
    written = read_sealed(folder / "exports.json", "")
    assert written == overview.to_json()
    file = GgufFile("tiny", "gguf-f16", folder / "gguf-f16/tiny-F16.gguf")
    assert whole(file) == file.path
    assert set(written["formats"]["gguf-f16"]["files"]) == {"gguf-f16/tiny-F16.gguf", "gguf-f16/LICENSE"}
    assert written["runtimes"]["llama.cpp"] == {"takes": ["GGUF"], "refusals": []}
    assert written["runtimes"]["sglang"]["takes"] == ["padded-llama"]  # its widths are no multiples of 256
    text = exports.overview_text(overview, folder)
    assert max(map(len, text.splitlines())) <= 100 + len(str(folder))
    flip_byte(file.path)
    with pytest.raises(DamagedFileError, match=r"tiny-F16.gguf is damaged .*; run `dvc repro export_child@tiny`"):
        whole(file)


def test_a_gguf_has_the_tokenizer_of_its_checkpoint(tmp_path: Path) -> None:
    save_child(tmp_path / "child", geometry("llama", tmp_path / "parent"), NO_LINEAR)
    write(read_checkpoint("tiny", tmp_path / "child", "again"), tmp_path / "exports", "gguf-bf16")
    fields = GGUFReader(tmp_path / "exports/gguf-bf16/tiny-BF16.gguf").fields
    assert fields["general.name"].contents() == "tiny"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 257
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 272  # as many as the embedding has rows


# --- the commands ----------------------------------------------------------------------------------------------------


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)


def test_check_runtimes_answers_for_any_config(tmp_path: Path) -> None:
    foreign(tmp_path / "theirs")
    ended = run("flows.cli", "check-runtimes", "--config", str(tmp_path / "theirs"))  # the folder will do
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "nemotron-nas: 3 blocks, hidden size 192, 2 heads of 128"
    assert "vllm           nemotron-nas, padded-llama" in lines
    row = lines.index("mlx-lm         padded-llama")
    assert lines[row + 1] == "               not nemotron-nas: it takes heads that share the hidden size evenly"
    assert max(map(len, lines)) <= 100
    answer = json.loads(
        run("flows.cli", "check-runtimes", "--config", "params/llama-3.1-70b.config.json", "--json").stdout
    )
    assert answer["runtimes"]["sglang"] == {"takes": ["nemotron-nas", "plain"], "refusals": []}
    assert [name for name, reasons in answer["formats"].items() if reasons] == ["padded-qwen3"]
    raw = read_json(ROOT / "params/llama-3.1-70b.config.json", "")
    blocks = [(Attention("gqa", 8), Ffn("gated", 28672)), (Attention("gqa", 4), Ffn("gated", 14336))] * 40
    raw = to_anymodel(ModelConfig.from_hf(raw, "70B"), blocks, {}, "bfloat16")
    write_json(tmp_path / "config.json", raw)
    ended = run("flows.cli", "check-runtimes", "--config", str(tmp_path / "config.json"))
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("llama with block_configs and per_layer_config: 80 blocks, hidden size 8192")
    assert lines[1] == "as it is, for ModelOpt or vLLM's AnyModel alone; below, what `puzzle export` makes of it"
    assert {"vllm           nemotron-nas, padded-llama", "sglang         padded-llama"} <= set(lines)
    raw["block_configs"][3]["ffn"]["moe"] = {"num_local_experts": 8}
    write_json(tmp_path / "config.json", raw)
    ended = run("flows.cli", "check-runtimes", "--config", str(tmp_path / "config.json"))
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "block_configs[3].ffn: moe is {'num_local_experts': 8}, which is not supported" in ended.stderr
    shutil.copy(ROOT / "params.yaml", tmp_path / "config.json")
    ended = run("flows.cli", "check-runtimes", "--config", str(tmp_path / "config.json"))
    assert ended.returncode != 0
    assert len(ended.stderr.splitlines()) == 1 and "is not valid JSON" in ended.stderr
