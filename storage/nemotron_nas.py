"""config.json of a model whose blocks differ: the nemotron-nas form, written and read (docs/runtimes.md).

In and out: a :class:`ModelConfig` with an attention and an FFN variant for each block. :func:`from_config_json` also
reads the config.json of the supported parents, whose blocks are alike. The architecture is NVIDIA's DeciLM.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from storage.config_fields import MAX_BLOCKS, MAX_TOKENS, MAX_VOCABULARY, Fields
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
_FFN_MULTIPLE = 256  # engines that read ffn_mult round the width to it (docs/runtimes.md)
_MAX_FFN_MULT = 1000.0
_UNSUPPORTED_FIELDS = (
    "window_length",
    "num_sink_tokens",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
)
"""Fields of others' block_configs that change what a block computes, and that no runtime named here reads."""


def ffn_mult(intermediate_size: int, hidden_size: int) -> float | None:
    """Return the multiplier from which engines compute this FFN width, None where their formula cannot give it.

    Engines compute round_up_256(int(2 * ffn_mult * hidden / 3)), the Llama rule of DeciLM's configs.
    """
    multiplier = 3 * intermediate_size / (2 * hidden_size)
    for candidate in (multiplier, multiplier * (1 + 1e-9)):
        if _width(candidate, hidden_size) == intermediate_size:
            return candidate
    return None


def _width(multiplier: float, hidden_size: int) -> int:
    """Return the FFN width that engines compute from `ffn_mult`."""
    base = int(2 * multiplier * hidden_size / 3)
    return -(-base // _FFN_MULTIPLE) * _FFN_MULTIPLE


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

    Raises:
        InputError: it is of another kind, or wrong.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    architectures = raw.get("architectures")
    if "block_configs" in raw or (isinstance(architectures, list) and CHILD_ARCHITECTURE in architectures):
        return from_nemotron_nas(raw, where)
    config = ModelConfig.from_hf(raw, where)
    block = (Attention("gqa", config.num_kv_heads), Ffn("gated", config.intermediate_size))
    return config, [block] * config.num_blocks


def from_nemotron_nas(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, list[tuple[Attention, Ffn]]]:
    """Read geometry and blocks of a nemotron-nas config.json, ours or another's.

    Raises:
        InputError: it is not in that form, with the field that is wrong.
    """
    fields = Fields(config, f"{where}: not a nemotron-nas config.json")
    refuse_other_attention(fields)
    listed = config.get("block_configs")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_BLOCKS:
        raise InputError(f"{fields.where}: block_configs must be a list of 1 to {MAX_BLOCKS:,} objects")
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    blocks = []
    for index, value in enumerate(listed):
        name = f"block_configs[{index}]"
        block = fields.inner(value, name).values
        attention = _attention_from(fields.inner(block.get("attention"), f"{name}.attention"), heads)
        blocks.append((attention, _ffn_from(fields.inner(block.get("ffn"), f"{name}.ffn"), hidden)))
    num_blocks = fields.count("num_hidden_layers", default=len(blocks))
    if num_blocks != len(blocks):
        raise InputError(f"{where}: num_hidden_layers is {num_blocks} but block_configs has {len(blocks)}")
    geometry = ModelConfig(
        architecture=CHILD_ARCHITECTURE,
        hidden_size=hidden,
        num_blocks=len(blocks),
        num_heads=heads,
        num_kv_heads=max(attention.num_kv_heads for attention, _ in blocks),
        head_dim=read_head_dim(fields),
        intermediate_size=max(ffn.intermediate_size for _, ffn in blocks),
        vocab_size=fields.count("vocab_size", MAX_VOCABULARY),
        rms_norm_eps=fields.number("rms_norm_eps", 1),
        rope=read_rope(config, where),
        context=fields.count("max_position_embeddings", MAX_TOKENS),
        tie_embeddings=fields.switch("tie_word_embeddings"),
        qkv_bias=fields.switch("qkv_bias", fields.switch("attention_bias")),
        output_bias=fields.switch("attention_bias"),
        mlp_bias=fields.switch("mlp_bias"),
        qk_norm=fields.switch("qk_norm"),
        activation=read_activation(config, where),
    )
    return geometry, blocks


def _attention_from(fields: Fields, num_heads: int) -> Attention:
    """Return the attention variant of a block in `block_configs`."""
    _refuse_unsupported(fields)
    if fields.switch("no_op"):
        return Attention("no_op")
    if fields.switch("replace_with_linear"):
        return Attention("linear")
    group = fields.count("n_heads_in_group")
    if num_heads % group:
        raise InputError(f"{fields.where}: n_heads_in_group {group} does not divide {num_heads} heads")
    return Attention("gqa", num_heads // group)


def _ffn_from(fields: Fields, hidden_size: int) -> Ffn:
    """Return the FFN variant of a block in `block_configs`."""
    _refuse_unsupported(fields)
    if fields.switch("no_op"):
        return Ffn("no_op")
    if fields.switch("replace_with_linear"):
        return Ffn("linear")
    if fields.values.get("intermediate_size") is not None:
        return Ffn("gated", fields.count("intermediate_size"))
    width = _width(fields.number("ffn_mult", _MAX_FFN_MULT), hidden_size)
    if width <= 0:
        raise InputError(f"{fields.where}: ffn_mult gives an FFN of width {width}")
    return Ffn("gated", width)


def _refuse_unsupported(fields: Fields) -> None:
    """Raise InputError where a half of a block computes something that no variant expresses."""
    unsupported = [key for key in _UNSUPPORTED_FIELDS if fields.values.get(key)]
    if unsupported:
        raise InputError(f"{fields.where}: {', '.join(unsupported)} is set, which is not supported")
