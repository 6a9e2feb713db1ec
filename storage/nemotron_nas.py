"""config.json of a model whose blocks differ: the nemotron-nas form, written and read (docs/runtimes.md).

In and out: a :class:`ModelConfig` with an attention and an FFN variant for each block. :func:`from_config_json` also
reads the config.json of the supported parents, whose blocks are alike or listed in one of the forms of
storage/block_configs.py. The architecture is NVIDIA's DeciLM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from storage.block_configs import (
    ANYMODEL,
    BLOCK_CONFIGS,
    PER_LAYER_CONFIG,
    activation_of,
    ffn_mult,
    read_block_configs,
    read_per_layer_config,
)
from storage.config_fields import MAX_TOKENS, MAX_VOCABULARY, Fields
from storage.files import InputError
from storage.model_config import (
    ModelConfig,
    common_fields,
    read_activation,
    read_head_dim,
    read_rope,
    refuse_other_attention,
)
from storage.variants import Attention, Ffn

NEMOTRON_NAS = "nemotron-nas"
"""The field `model_type`."""
CHILD_ARCHITECTURE = "DeciLMForCausalLM"


def to_nemotron_nas(
    config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]], special_tokens: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """Return the config.json of a child in the nemotron-nas form.

    An FFN has `ffn_mult` where the engines' formula gives its width, else its exact `intermediate_size`, which vLLM and
    our class read: engines that know the formula alone then fail to load it instead of computing another width.
    """
    return {
        "architectures": [CHILD_ARCHITECTURE],
        "model_type": NEMOTRON_NAS,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": None,
        "head_dim": config.head_dim,
        "intermediate_size": None,
        **common_fields(config),
        "attention_bias": config.output_bias,
        "qkv_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "qk_norm": config.qk_norm,
        **special_tokens,
        "dtype": dtype,
        "block_configs": [_block_config(config, attention, ffn) for attention, ffn in blocks],
    }


def _block_config(config: ModelConfig, attention: Attention, ffn: Ffn) -> dict[str, Any]:
    """Return a block's entry in `block_configs`."""
    group = config.num_heads // attention.num_kv_heads if attention.kind == "gqa" else None
    width = ffn.intermediate_size or None
    multiplier = ffn_mult(width, config.hidden_size) if width else None
    exact = {"intermediate_size": width} if width and multiplier is None else {}  # mlx-lm refuses an unknown key
    return {
        "attention": {
            "n_heads_in_group": group,
            "no_op": attention.kind == "no_op",
            "replace_with_linear": attention.kind == "linear",
        },
        "ffn": {
            "ffn_mult": multiplier,
            **exact,
            "no_op": ffn.kind == "no_op",
            "replace_with_linear": ffn.kind == "linear",
        },
    }


def from_config_json(raw: Any, where: str) -> tuple[ModelConfig, list[tuple[Attention, Ffn]]]:
    """Read geometry and blocks from a config.json in nemotron-nas form or of a supported parent; errors name `where`.

    The blocks of a parent's family may differ where AnyModel's `block_configs`, or `per_layer_config`, say so.

    Raises:
        InputError: it is of another kind, or wrong.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    architectures = raw.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if CHILD_ARCHITECTURE in names or (BLOCK_CONFIGS in raw and not names):
        return from_nemotron_nas(raw, where)
    listed, per_layer = raw.get(BLOCK_CONFIGS), raw.get(PER_LAYER_CONFIG)
    rest = {**activation_of(listed), **_without_blocks(raw)}
    if ANYMODEL in names:
        rest["architectures"] = [Fields(raw, where).text("base_architecture", f"{ANYMODEL} of no base_architecture")]
    config, fields = ModelConfig.from_hf(rest, where), Fields(rest, where)
    blocks = read_per_layer_config(per_layer, fields, config)
    if listed is not None:
        in_list = read_block_configs(listed, fields, config.activation)
        if per_layer and blocks != in_list:
            first = next(index for index, pair in enumerate(zip(blocks, in_list, strict=True)) if len(set(pair)) > 1)
            raise InputError(
                f"{where}: block_configs and per_layer_config disagree on block {first}; take out the one that is wrong"
            )
        blocks = in_list
    return _with_sizes_of(config, blocks), blocks


def _without_blocks(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the lists of blocks that differ."""
    return {key: value for key, value in raw.items() if key not in (BLOCK_CONFIGS, PER_LAYER_CONFIG)}


def _with_sizes_of(config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]]) -> ModelConfig:
    """Return the geometry with the most kv heads and the widest FFN of all blocks; 0 where no block has any."""
    heads, widths = zip(*((attention.num_kv_heads, ffn.intermediate_size) for attention, ffn in blocks), strict=True)
    return replace(config, num_kv_heads=max(heads), intermediate_size=max(widths))


def from_nemotron_nas(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, list[tuple[Attention, Ffn]]]:
    """Read geometry and blocks of a nemotron-nas config.json, ours or another's.

    Raises:
        InputError: it is not in that form, with the field that is wrong.
    """
    listed = config.get(BLOCK_CONFIGS)
    config = {**activation_of(listed), **{key: value for key, value in config.items() if key != BLOCK_CONFIGS}}
    fields = Fields(config, f"{where}: not a nemotron-nas config.json")
    refuse_other_attention(fields)
    if fields.text("position_embedding_type", "rope") != "rope":
        raise InputError(f"{where}: position_embedding_type is not rope, and no other positions are supported")
    blocks = read_block_configs(listed, fields, read_activation(config, where))
    geometry = ModelConfig(
        architecture=CHILD_ARCHITECTURE,
        hidden_size=fields.count("hidden_size"),
        num_blocks=len(blocks),
        num_heads=fields.count("num_attention_heads"),
        num_kv_heads=max(attention.num_kv_heads for attention, _ in blocks),
        head_dim=read_head_dim(fields),
        intermediate_size=max(ffn.intermediate_size for _, ffn in blocks),
        vocab_size=fields.count("vocab_size", MAX_VOCABULARY),
        rms_norm_eps=fields.number("rms_norm_eps", 1),
        rope=read_rope(config, where),
        context=fields.count("max_position_embeddings", MAX_TOKENS),
        tie_embeddings=fields.switch("tie_word_embeddings"),
        qkv_bias=fields.switch("qkv_bias", fields.switch("attention_bias")),
        output_bias=fields.switch("o_proj_bias", fields.switch("attention_bias")),
        mlp_bias=fields.switch("mlp_bias"),
        qk_norm=fields.switch("qk_norm"),
        activation=read_activation(config, where),
    )
    return geometry, blocks
