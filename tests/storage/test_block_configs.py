"""Blocks that differ, in every form that others write them in: read alike, or refused by field, block and value."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaConfig

from storage.block_configs import to_anymodel
from storage.files import InputError
from storage.model_config import ModelConfig
from storage.nemotron_nas import from_config_json, to_nemotron_nas
from storage.variants import Attention, Ffn
from tests.storage.test_config_fields import LLAMA

Raw = dict[str, Any]
PARENT: Raw = {**LLAMA, "hidden_size": 192, "head_dim": 48, "intermediate_size": 768}
CONFIG = ModelConfig.from_hf(PARENT, "the test")
BLOCKS = [
    (Attention("gqa", 1), Ffn("gated", 512)),
    (Attention("no_op"), Ffn("gated", 768)),
    (Attention("gqa", 2), Ffn("no_op")),
]
OVERRIDES: Raw = {
    "00": {"num_key_value_heads": 1, "intermediate_size": 512},
    "1": {"skip": ["attention"], "rms_norm_eps": 1e-5},  # as everywhere else
    "02": {"skip": ["mlp"]},
}


def published() -> Raw:
    """Return the form of Llama-3_3-Nemotron-Super-49B-v1's config.json, with its fields of each half."""
    raw = to_nemotron_nas(CONFIG, BLOCKS, {}, "float32")
    for block in raw["block_configs"]:
        block["attention"] |= {"num_sink_tokens": None, "window_length": None, "sparsify": None}
        block["attention"] |= {"unshifted_sink": False, "use_prefill_window_in_sink_attention": False}
        block["ffn"] |= {"sparsify": None}
    return raw


def converted() -> Raw:
    """Return what ModelOpt's earlier converter of a Llama wrote: exact widths, an activation in every FFN alone."""
    raw = published() | {"position_embedding_type": "rope", "o_proj_bias": False}
    del raw["hidden_act"]
    for block, (_, ffn) in zip(raw["block_configs"], BLOCKS, strict=True):
        block["attention"] |= {"mamba": None, "llama4": None, "weights_precision": "bf16"}
        del block["ffn"]["ffn_mult"]
        block["ffn"] |= {"moe": None, "weights_precision": "bf16", "intermediate_size": ffn.intermediate_size or None}
        block["ffn"] |= {"gated": True, "hidden_act": "gelu"} if ffn.kind == "gated" else {"gated": None}
        block["parallel_blocks"] = None
    return raw


def anymodel() -> Raw:
    """Return what ModelOpt's AnyModel writes: the family's config.json, defaults of its dataclasses in every block."""
    raw = PARENT | {"block_configs": to_anymodel(CONFIG, BLOCKS, {}, "float32")["block_configs"]}
    for block in raw["block_configs"]:
        common = {"sparsify": None, "weights_precision": "bf16"}
        block["attention"] |= common | {"mamba": None, "llama4": None}
        block["ffn"] |= common | {"moe": None}
        block["parallel_blocks"] = None
    return raw


FORMS: dict[str, Callable[[], Raw]] = {
    "published": published,
    "converted": converted,
    "AnyModel": anymodel,
    "AnyModel for vLLM": lambda: anymodel() | {"architectures": ["AnyModel"], "base_architecture": "LlamaForCausalLM"},
    "per_layer_config": lambda: PARENT | {"per_layer_config": OVERRIDES},
    "both lists": lambda: anymodel() | {"per_layer_config": OVERRIDES},
    "ours": lambda: to_anymodel(CONFIG, BLOCKS, {}, "float32"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_blocks_are_read_from_every_form(form: str) -> None:
    config, blocks = from_config_json(FORMS[form](), "my.json")
    assert blocks == BLOCKS
    assert (config.num_blocks, config.num_kv_heads, config.intermediate_size) == (3, 2, 768)
    assert config.activation == ("gelu" if form == "converted" else "silu")


def test_a_family_keeps_what_its_name_says() -> None:
    """The biases of a Qwen2, which has no field for them, were lost where `block_configs` stood in its config.json."""
    raw = anymodel() | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    config, _ = from_config_json(raw, "my.json")
    assert (config.architecture, config.qkv_bias, config.output_bias) == ("Qwen2ForCausalLM", True, False)


def test_transformers_reads_our_per_layer_config_as_we_write_it() -> None:
    blocks = [*BLOCKS, (Attention("no_op"), Ffn("no_op")), *[(Attention("gqa", 2), Ffn("gated", 768))] * 8]
    written = to_anymodel(CONFIG, blocks, {}, "float32")
    theirs = LlamaConfig(**copy.deepcopy(written))
    assert theirs.to_dict()["per_layer_config"] == written["per_layer_config"]
    layers = [(layer.num_key_value_heads, layer.intermediate_size, layer.skip) for layer in theirs.per_layer_config]
    assert layers[:4] == [(1, 512, []), (2, 768, ["attention"]), (2, 768, ["mlp"]), (2, 768, ["attention", "mlp"])]
    assert layers[4:] == [(2, 768, [])] * 8


MAMBA = {"state_dim": 128, "num_heads": 8, "head_dim": 16, "num_groups": 1}


@pytest.mark.parametrize("form", ["published", "AnyModel"])
@pytest.mark.parametrize(
    ("half", "changes", "reason"),
    [
        ("attention", {"mamba": MAMBA}, r"\.attention: mamba is {'.*, which is not supported, expected null: a block"),
        ("attention", {"llama4": {}}, r"\.attention: llama4 is {}, which is not supported"),
        ("attention", {"window_length": 0}, r"\.attention: window_length is 0, which is not supported, expected null"),
        ("attention", {"num_sink_tokens": 4}, r"\.attention: num_sink_tokens is 4, .* expected null or 0"),
        ("attention", {"unshifted_sink": True}, r"\.attention: unshifted_sink is True, .* expected null or false"),
        ("attention", {"sparsify": ["q"]}, r"\.attention: sparsify is \['q'\], .* expected null or \[\]"),
        ("attention", {"use_rope": False}, r"\.attention: 'use_rope' is False, and is not known: it may change"),
        ("attention", {"num_key_value_heads": 3, "n_heads_in_group": None}, "4 attention heads cannot share 3 kv"),
        ("attention", {"num_key_value_heads": 2, "n_heads_in_group": 4}, "n_heads_in_group 4 .*heads 2 disagree"),
        ("attention", {"num_key_value_heads": None, "n_heads_in_group": None}, "expected one of them"),
        ("ffn", {"moe": {"num_local_experts": 8}}, r"\.ffn: moe is {'num_local_experts': 8}, .* expected null"),
        ("ffn", {"gated": False}, r"\.ffn: gated is False, which is not supported, expected null or true"),
        ("ffn", {"hidden_act": "gelu"}, r"\.ffn: hidden_act is 'gelu', .* expected null or \"silu\""),
        ("ffn", {"weights_precision": "nvfp4"}, r"\.ffn: weights_precision is 'nvfp4', .* expected null or \"bf16\""),
        ("ffn", {"intermediate_size": 512, "ffn_mult": 6.0}, "intermediate_size is 512 but ffn_mult gives .* 768"),
        ("ffn", {"intermediate_size": None, "ffn_mult": None}, "ffn_mult and intermediate_size are missing or null"),
        (None, {"parallel_blocks": [{}]}, r": parallel_blocks is \[{}\], .* expected null or \[\]"),
        (None, {"subblock_configs": [{"kind": "ffn"}]}, r": 'subblock_configs' is \[.*\], and is not known"),
        (None, {"ffn": None}, r"\.ffn is missing or null, expected an object"),
    ],
)
def test_what_no_variant_expresses_is_refused_by_name(form: str, half: str | None, changes: Raw, reason: str) -> None:
    """Five of them were said to be computed right by five runtimes."""
    raw = FORMS[form]()
    block = raw["block_configs"][0]
    (block[half] if half else block).update(changes)
    with pytest.raises(InputError, match=rf"^my.json: .*block_configs\[0\].*{reason}"):
        from_config_json(raw, "my.json")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"per_layer_config": []}, "per_layer_config is .., expected an object"),
        ({"per_layer_config": {"3": {}}}, "the key '3', expected numbers of layers from 0 to 2, each once"),
        ({"per_layer_config": {"1": {}, "01": {}}}, "the key '01', expected numbers of layers"),
        ({"per_layer_config": {"-1": {}}}, "the key '-1', expected numbers of layers"),
        ({"per_layer_config": {"1": 5}}, r"per_layer_config\[1\] is 5, expected an object"),
        ({"per_layer_config": {"1": {"skip": ["mixer"]}}}, r"\[1\]: skip is \['mixer'\], expected a list of attention"),
        ({"per_layer_config": {"1": {"rms_norm_eps": 1.0}}}, "rms_norm_eps is 1.0, .* expected 1e-05"),
        ({"per_layer_config": {"1": {"rope_theta": None}}}, "rope_theta is missing or null, .* expected 10000.0"),
        ({"per_layer_config": {"1": {"num_experts": 8}}}, "'num_experts' is 8, and is not known"),
        ({"per_layer_config": {"1": {"num_key_value_heads": 3}}}, "4 attention heads cannot share 3 kv heads evenly"),
        ({"per_layer_config": {"1": {"intermediate_size": 0}}}, "intermediate_size is 0, expected a whole number"),
        ({**anymodel(), "per_layer_config": {"1": {"skip": ["mlp"]}}}, "and per_layer_config disagree on block 0"),
        ({**anymodel(), "num_hidden_layers": 2}, "num_hidden_layers is 2 but block_configs has 3"),
        ({**anymodel(), "architectures": ["MixtralForCausalLM"]}, "its FFN is a mixture of experts"),
        ({**anymodel(), "architectures": ["AnyModel"]}, "architecture AnyModel of no base_architecture is not"),
        ({**published(), "position_embedding_type": "none"}, "position_embedding_type is not rope"),
        ({**published(), "per_layer_config": {"1": {}}}, "per_layer_config is set, which is not supported here"),
    ],
)
def test_a_wrong_list_is_refused(changes: Raw, reason: str) -> None:
    with pytest.raises(InputError, match=rf"^my.json: .*{reason}"):
        from_config_json({**PARENT, **changes}, "my.json")


def test_published_widths_and_heads() -> None:
    """Two blocks of Llama-3_3-Nemotron-Super-49B-v1: groups of 8 of 64 heads, half a width of Llama-3-70B and all."""
    raw = published() | {"hidden_size": 8192, "num_attention_heads": 64, "head_dim": 128, "num_hidden_layers": 2}
    del raw["block_configs"][2]
    for block, multiplier in zip(raw["block_configs"], (2.625, 5.25), strict=True):
        block["attention"] |= {"no_op": False, "n_heads_in_group": 8}
        block["ffn"]["ffn_mult"] = multiplier
    assert from_config_json(raw, "my.json")[1] == [
        (Attention("gqa", 8), Ffn("gated", width)) for width in (14336, 28672)
    ]


@pytest.mark.parametrize("form", ["AnyModel", "per_layer_config"])
def test_a_parent_has_blocks_that_are_alike(form: str) -> None:
    with pytest.raises(
        InputError, match="is set, which is not supported here: its layers must be alike; if they are, `p"
    ):
        ModelConfig.from_hf(FORMS[form](), "my.json")
