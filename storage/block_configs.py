"""Blocks that differ, as config.json lists them: `block_configs` in two forms, and `per_layer_config`.

In and out: an attention and an FFN variant for each block. DeciLM's form of `block_configs`, which NVIDIA's published
checkpoints have, counts the query heads of a kv head (`n_heads_in_group`) and multiplies the width (`ffn_mult`).
AnyModel's, which NVIDIA's ModelOpt (modelopt.torch.puzzletron) writes into the config.json of the parent's family, has
`num_key_value_heads` and `intermediate_size`. `per_layer_config` is that of transformers 5.15 and newer: by layer, what
differs from the rest of config.json, and which halves are skipped. Whatever else a block says is refused by name,
unless its value is the one that changes nothing (docs/runtimes.md).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from storage.config_fields import MAX_BLOCKS, Fields, shown
from storage.files import InputError
from storage.model_config import ModelConfig, to_hf
from storage.variants import Attention, Ffn

BLOCK_CONFIGS = "block_configs"
PER_LAYER_CONFIG = "per_layer_config"
ANYMODEL = "AnyModel"
"""The architecture that ModelOpt and vLLM's AnyModel read, beside a `base_architecture`."""
_FFN_MULTIPLE = 256  # engines that read ffn_mult round the width to it (docs/runtimes.md)
_MAX_FFN_MULT = 1000.0
_KV_HEADS, _WIDTH, _SKIP = "num_key_value_heads", "intermediate_size", "skip"
_HALVES = ("attention", "mlp")
"""Names of the halves of a block that `skip` may list."""

_SUBBLOCK: Mapping[str, tuple[Any, ...]] = {"sparsify": (None, []), "weights_precision": (None, "bf16")}
_ATTENTION: Mapping[str, tuple[Any, ...]] = {
    **_SUBBLOCK,
    "window_length": (None,),
    "num_sink_tokens": (None, 0),
    "unshifted_sink": (None, False),
    "use_prefill_window_in_sink_attention": (None, False),
    "mamba": (None,),
    "llama4": (None,),
}
_FFN: Mapping[str, tuple[Any, ...]] = {**_SUBBLOCK, "moe": (None,), "gated": (None, True)}
_BLOCK: Mapping[str, tuple[Any, ...]] = {"parallel_blocks": (None, [])}
"""Fields of a block, and of its halves, that change what it computes, with the values that change nothing."""
_SWITCHES = ("no_op", "replace_with_linear")
_ADVICE = "run the checkpoint in the software that wrote it"
_KINDS = (
    "a block here is attention with a number of kv heads and a gated FFN of a width, one linear layer in place of "
    "either, or nothing"
)


def ffn_mult(intermediate_size: int, hidden_size: int) -> float | None:
    """Return the multiplier from which engines compute this FFN width, None where their formula cannot give it.

    Engines compute round_up_256(int(2 * ffn_mult * hidden / 3)), the Llama rule of DeciLM's configs.
    """
    multiplier = 3 * intermediate_size / (2 * hidden_size)
    for candidate in (multiplier, multiplier * (1 + 1e-9)):
        if _multiplied(candidate, hidden_size) == intermediate_size:
            return candidate
    return None


def _multiplied(multiplier: float, hidden_size: int) -> int:
    """Return the FFN width that engines compute from `ffn_mult`."""
    base = int(2 * multiplier * hidden_size / 3)
    return -(-base // _FFN_MULTIPLE) * _FFN_MULTIPLE


# --- read ------------------------------------------------------------------------------------------------------------


def activation_of(listed: Any) -> dict[str, str]:
    """Return {"hidden_act": what the FFNs of `block_configs` say}, where all that say one agree; else {}.

    It stands in for the field of config.json itself, which configs that say it in every block leave out.
    """
    ffns = [block.get("ffn") for block in listed if isinstance(block, Mapping)] if isinstance(listed, list) else []
    names = {str(ffn["hidden_act"]) for ffn in ffns if isinstance(ffn, Mapping) and ffn.get("hidden_act") is not None}
    return {"hidden_act": names.pop()} if len(names) == 1 else {}


def read_block_configs(listed: Any, fields: Fields, activation: str) -> list[tuple[Attention, Ffn]]:
    """Read `block_configs` in either form; `fields` are those of config.json itself.

    Raises:
        InputError: it is no such list, or a block computes something that no variant does.
    """
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_BLOCKS:
        raise InputError(f"{fields.where}: block_configs must be a list of 1 to {MAX_BLOCKS:,} objects")
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    blocks = []
    for index, value in enumerate(listed):
        name = f"{BLOCK_CONFIGS}[{index}]"
        block = fields.inner(value, name)
        _refuse_others(block, _BLOCK, ("attention", "ffn"))
        attention = _attention_from(fields.inner(block.values.get("attention"), f"{name}.attention"), heads)
        blocks.append((attention, _ffn_from(fields.inner(block.values.get("ffn"), f"{name}.ffn"), hidden, activation)))
    num_blocks = fields.count("num_hidden_layers", default=len(blocks))
    if num_blocks != len(blocks):
        raise InputError(f"{fields.where}: num_hidden_layers is {num_blocks} but block_configs has {len(blocks)}")
    return blocks


def _attention_from(fields: Fields, num_heads: int) -> Attention:
    """Return the attention variant of a block in `block_configs`."""
    _refuse_others(fields, _ATTENTION, (*_SWITCHES, "n_heads_in_group", _KV_HEADS))
    if fields.switch("no_op"):
        return Attention("no_op")
    if fields.switch("replace_with_linear"):
        return Attention("linear")
    _refuse_without_either(fields, "n_heads_in_group", _KV_HEADS)
    if fields.values.get(_KV_HEADS) is None:
        group = fields.count("n_heads_in_group")
        if num_heads % group:
            raise InputError(f"{fields.where}: n_heads_in_group {group} does not divide {num_heads} heads")
        return Attention("gqa", num_heads // group)
    attention = _attention_of(fields, num_heads)
    group = fields.count("n_heads_in_group", default=num_heads // attention.num_kv_heads)
    if group * attention.num_kv_heads != num_heads:
        raise InputError(
            f"{fields.where}: n_heads_in_group {group} and {_KV_HEADS} {attention.num_kv_heads} disagree on "
            f"{num_heads} heads; take out the one that is wrong"
        )
    return attention


def _attention_of(fields: Fields, num_heads: int) -> Attention:
    """Return the attention variant with the `num_key_value_heads` of `fields`."""
    kv_heads = fields.count(_KV_HEADS)
    if num_heads % kv_heads:
        raise InputError(f"{fields.where}: {num_heads} attention heads cannot share {kv_heads} kv heads evenly")
    return Attention("gqa", kv_heads)


def _ffn_from(fields: Fields, hidden_size: int, activation: str) -> Ffn:
    """Return the FFN variant of a block in `block_configs`."""
    _refuse_others(fields, {**_FFN, "hidden_act": (None, activation)}, (*_SWITCHES, "ffn_mult", _WIDTH))
    if fields.switch("no_op"):
        return Ffn("no_op")
    if fields.switch("replace_with_linear"):
        return Ffn("linear")
    _refuse_without_either(fields, "ffn_mult", _WIDTH)
    width = fields.count(_WIDTH) if fields.values.get(_WIDTH) is not None else None
    if width is not None and fields.values.get("ffn_mult") is None:
        return Ffn("gated", width)
    multiplied = _multiplied(fields.number("ffn_mult", _MAX_FFN_MULT), hidden_size)
    if multiplied <= 0:
        raise InputError(f"{fields.where}: ffn_mult gives an FFN of width {multiplied}")
    if width not in (None, multiplied):
        raise InputError(
            f"{fields.where}: {_WIDTH} is {width} but ffn_mult gives a width of {multiplied}; take out the one that is "
            "wrong"
        )
    return Ffn("gated", multiplied)


def _refuse_without_either(fields: Fields, *keys: str) -> None:
    """Raise InputError where a half of a block has neither form of its size."""
    if all(fields.values.get(key) is None for key in keys):
        raise InputError(f"{fields.where}: {' and '.join(keys)} are missing or null, expected one of them")


def _refuse_others(fields: Fields, neutral: Mapping[str, tuple[Any, ...]], read: Sequence[str]) -> None:
    """Raise InputError for a field that is none of `read`, unless it has a value that changes nothing."""
    for key, value in fields.values.items():
        if key in read or value in neutral.get(key, (None,)):
            continue
        if key not in neutral:
            raise InputError(
                f"{fields.where}: {key!r:.80} is {shown(value)}, and is not known: it may change what the block "
                f"computes; take it out if it does not, else {_ADVICE}"
            )
        expected = " or ".join(f"{json.dumps(option):.80}" for option in neutral[key])
        raise InputError(
            f"{fields.where}: {key} is {shown(value)}, which is not supported, expected {expected}: {_KINDS}; {_ADVICE}"
        )


def read_per_layer_config(value: Any, fields: Fields, config: ModelConfig) -> list[tuple[Attention, Ffn]]:
    """Read `per_layer_config`; `fields` and `config` are config.json's own, which hold where a layer says nothing.

    Raises:
        InputError: it names a layer that there is not, or a layer differs in something that no variant does.
    """
    blocks = [(Attention("gqa", config.num_kv_heads), Ffn("gated", config.intermediate_size))] * config.num_blocks
    if value is None:
        return blocks
    named: dict[int, str] = {}
    for key, overrides in fields.inner(value, PER_LAYER_CONFIG).values.items():
        index = int(key) if key.isascii() and key.isdigit() and len(key) < 9 else config.num_blocks
        if not index < config.num_blocks or index in named:
            raise InputError(
                f"{fields.where}: {PER_LAYER_CONFIG} has the key {key!r:.80}, expected numbers of layers from 0 to "
                f"{config.num_blocks - 1}, each once"
            )
        named[index] = key
        layer = fields.inner(overrides, f"{PER_LAYER_CONFIG}[{index}]")
        blocks[index] = _layer_from(layer, fields.values, config)
    return blocks


def _layer_from(layer: Fields, everywhere: Mapping[str, Any], config: ModelConfig) -> tuple[Attention, Ffn]:
    """Return the variants of a layer in `per_layer_config`; fields that are as `everywhere` else change nothing."""
    same = {key: (everywhere[key],) for key in layer.values if key in everywhere}
    _refuse_others(layer, same, (_KV_HEADS, _WIDTH, _SKIP))
    skipped = layer.values.get(_SKIP) or []
    if not isinstance(skipped, list) or any(half not in _HALVES for half in skipped):
        raise InputError(f"{layer.where}: skip is {shown(skipped)}, expected a list of {' and '.join(_HALVES)}")
    attention, ffn = Attention("gqa", config.num_kv_heads), Ffn("gated", config.intermediate_size)
    if _KV_HEADS in layer.values:
        attention = _attention_of(layer, config.num_heads)
    if _WIDTH in layer.values:
        ffn = Ffn("gated", layer.count(_WIDTH))
    return (Attention("no_op") if "attention" in skipped else attention, Ffn("no_op") if "mlp" in skipped else ffn)


# --- written ---------------------------------------------------------------------------------------------------------


def widest(blocks: Sequence[tuple[Attention, Ffn]]) -> tuple[Attention, Ffn]:
    """Return the most kv heads and the widest FFN of all blocks; one where no block has any."""
    heads, widths = zip(*((attention.num_kv_heads, ffn.intermediate_size) for attention, ffn in blocks), strict=True)
    return Attention("gqa", max(heads) or 1), Ffn("gated", max(widths) or 1)


def to_anymodel(
    config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]], special_tokens: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """Return config.json in AnyModel's form of a child without linear layers: its family's, and two lists of blocks.

    ModelOpt reads `block_configs`, newer versions of vLLM's AnyModel read `per_layer_config`.
    """
    assert not any("linear" in (attention.kind, ffn.kind) for attention, ffn in blocks), blocks
    of_family = to_hf(config, len(blocks), widest(blocks), special_tokens, dtype)
    overrides = dict(_overrides(blocks))
    digits = len(str(max(overrides, default=0)))  # as transformers writes them, so that they sort
    [base_architecture] = of_family.pop("architectures")
    return {
        "architectures": [ANYMODEL],
        "base_architecture": base_architecture,
        **of_family,
        BLOCK_CONFIGS: [_block_config(attention, ffn) for attention, ffn in blocks],
        PER_LAYER_CONFIG: {f"{index:0{digits}}": values for index, values in overrides.items()},
    }


def _block_config(attention: Attention, ffn: Ffn) -> dict[str, Any]:
    """Return a block's entry in AnyModel's `block_configs`."""
    switches = [{"no_op": kind == "no_op", "replace_with_linear": False} for kind in (attention.kind, ffn.kind)]
    return {
        "attention": {**switches[0], _KV_HEADS: attention.num_kv_heads or None},
        "ffn": {**switches[1], _WIDTH: ffn.intermediate_size or None},
    }


def _overrides(blocks: Sequence[tuple[Attention, Ffn]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the index of each block that is not the `widest`, with what differs."""
    most, wide = widest(blocks)
    for index, (attention, ffn) in enumerate(blocks):
        values: dict[str, Any] = {}
        if attention.kind == "gqa" and attention != most:
            values[_KV_HEADS] = attention.num_kv_heads
        if ffn.kind == "gated" and ffn != wide:
            values[_WIDTH] = ffn.intermediate_size
        skipped = [half for half, kind in zip(_HALVES, (attention.kind, ffn.kind), strict=True) if kind == "no_op"]
        if values or skipped:
            yield index, values | ({_SKIP: skipped} if skipped else {})
