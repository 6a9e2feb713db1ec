"""The loaders of engines, written anew: the checkpoint tensors that they take for a nemotron-nas config.json.

In: config.json as JSON. Out: {tensor name in the checkpoint: shape}, or :class:`RefusedError` where the engine raises
or would compute something else without a word. One function an engine, written from reading its sources (at these
commits; tensor parallelism 1, no quantisation), in this project's words:

- vLLM: models/nemotron_nas.py (00bd149), models/llama.py (e06c9ba), model_arch_config_convertor.py
- SGLang: srt/models/nemotron_nas.py (15a024d), srt/models/llama.py (bf7a0e2), srt/configs/model_config.py (001adf5)
- TensorRT-LLM: _torch/models/modeling_nemotron_nas.py (0193dbd), _torch/modules/attention.py (00547a2),
  _torch/models/checkpoints/hf/nemotron_nas_weight_mapper.py (11a11b2)
- mlx-lm: models/nemotron-nas.py (13c89f4)

The first three hold q, k and v in one parameter `qkv_proj`, gate and up in `gate_up_proj`; a fused parameter is filled
row block by row block from the checkpoint's tensors, which are what is listed here. They read the config through the
checkpoint's own class (remote code), so attributes decide; mlx-lm reads the JSON.
"""

from collections.abc import Callable, Mapping
from typing import Any

from storage.records import Runtime
from storage.remote_code.configuration_nemotron_nas import NemotronNasConfig

Shapes = dict[str, tuple[int, ...]]


class RefusedError(Exception):
    """The engine raises, or computes something else; the message says why."""


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    """Return a linear layer's weight, and its bias if it has one."""
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _fused(prefix: str, parts: Mapping[str, int], columns: int, bias: bool) -> Shapes:
    """Return the tensors that fill one parameter, a block of rows each."""
    filled: Shapes = {}
    for name, rows in parts.items():
        filled |= _linear(f"{prefix}.{name}", rows, columns, bias)
    return filled


def _attention(
    prefix: str, hidden: int, heads: int, kv_heads: int, head_dim: int, *, qkv_bias: bool, output_bias: bool
) -> Shapes:
    parts = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
    return _fused(prefix, parts, hidden, qkv_bias) | _linear(f"{prefix}.o_proj", hidden, heads * head_dim, output_bias)


def _ffn(prefix: str, hidden: int, width: int, bias: bool) -> Shapes:
    gate_up = _fused(prefix, {"gate_proj": width, "up_proj": width}, hidden, bias)
    return gate_up | _linear(f"{prefix}.down_proj", hidden, width, bias)


def _around(vocabulary: int, hidden: int, tied: bool) -> Shapes:
    """Return all but the blocks; a head that is tied is not looked for."""
    head = {} if tied else {"lm_head.weight": (vocabulary, hidden)}
    return {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)} | head


def _width(ffn_mult: float, hidden: int) -> int:
    """Apply DeciLM's rule, the same in all four: two thirds of a multiple of hidden, up to the next multiple of 256."""
    base = int(2 * ffn_mult * hidden / 3)
    return base + -base % 256


def _attention_comes_first(config: NemotronNasConfig) -> None:
    """Refuse as vLLM and SGLang: attention starts the residual; a norm without one gives one value, two are taken."""
    for block in config.block_configs:
        if not block.attention.no_op:
            return
        if not block.ffn.no_op:
            break
    raise RefusedError("a norm that expects a residual comes before the first attention")


def vllm(config_json: Mapping[str, Any]) -> Shapes:
    """Load as vLLM: `ffn_mult` if there is such an attribute, else `intermediate_size`; both biases, nothing linear."""
    config = NemotronNasConfig(**config_json)
    hidden, heads = config.hidden_size, config.num_attention_heads
    _attention_comes_first(config)
    shapes = _around(config.vocab_size, hidden, config.tie_word_embeddings)
    biases = {"qkv_bias": config.qkv_bias, "output_bias": config.attention_bias}
    for index, block in enumerate(config.block_configs):
        prefix = f"model.layers.{index}"
        if not block.attention.no_op:
            if block.attention.n_heads_in_group is None:
                raise RefusedError(f"block {index}: heads are divided by n_heads_in_group, which is null")
            kv_heads = heads // block.attention.n_heads_in_group
            shapes |= _attention(f"{prefix}.self_attn", hidden, heads, kv_heads, _head_dim(config), **biases)
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        if not block.ffn.no_op:
            if hasattr(block.ffn, "ffn_mult"):
                width = _width(block.ffn.ffn_mult, hidden)
            else:
                width = _needed(block.ffn, "intermediate_size", index)
            _silu_only(getattr(block.ffn, "hidden_act", config.hidden_act))
            shapes |= _ffn(f"{prefix}.mlp", hidden, width, config.mlp_bias)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def sglang(config_json: Mapping[str, Any]) -> Shapes:
    """Load as SGLang: `ffn_mult` alone, one number of kv heads in all, o_proj's bias is qkv's, FFNs have none."""
    config = NemotronNasConfig(**config_json)
    hidden, heads = config.hidden_size, config.num_attention_heads
    _attention_comes_first(config)
    attentions = [block.attention for block in config.block_configs if not block.attention.no_op]
    if any(attention.n_heads_in_group is None for attention in attentions):
        raise RefusedError("heads are divided by n_heads_in_group, which is null")
    if len({heads // attention.n_heads_in_group for attention in attentions}) > 1:
        raise RefusedError("kv heads differ between blocks")
    shapes = _around(config.vocab_size, hidden, config.tie_word_embeddings)
    biases = {"qkv_bias": config.qkv_bias, "output_bias": config.qkv_bias}
    for index, block in enumerate(config.block_configs):
        prefix = f"model.layers.{index}"
        if not block.attention.no_op:
            kv_heads = heads // block.attention.n_heads_in_group
            shapes |= _attention(f"{prefix}.self_attn", hidden, heads, kv_heads, _head_dim(config), **biases)
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        if not block.ffn.no_op:
            width = _width(_needed(block.ffn, "ffn_mult", index), hidden)
            _silu_only(config.hidden_act)
            shapes |= _ffn(f"{prefix}.mlp", hidden, width, bias=False)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def tensorrt_llm(config_json: Mapping[str, Any]) -> Shapes:
    """Load as TensorRT-LLM, PyTorch backend: `ffn_mult` alone, SiLU whatever config says, no biases, linear layers."""
    config = NemotronNasConfig(**config_json)
    hidden, heads = config.hidden_size, config.num_attention_heads
    shapes = _around(config.vocab_size, hidden, config.tie_word_embeddings)
    biases = {"qkv_bias": False, "output_bias": False}
    for index, block in enumerate(config.block_configs):
        prefix = f"model.layers.{index}"
        if not block.attention.no_op:
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            if block.attention.replace_with_linear:
                shapes |= _linear(f"{prefix}.self_attn.linear_attn", hidden, hidden, bias=False)
            else:
                kv_heads = heads // block.attention.n_heads_in_group
                shapes |= _attention(f"{prefix}.self_attn", hidden, heads, kv_heads, _head_dim(config), **biases)
        if not block.ffn.no_op:
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            if block.ffn.replace_with_linear:
                shapes |= _linear(f"{prefix}.mlp.linear_mlp", hidden, hidden, bias=False)
            else:
                width = _width(_needed(block.ffn, "ffn_mult", index), hidden)
                _silu_only(config.hidden_act)
                shapes |= _ffn(f"{prefix}.mlp", hidden, width, bias=False)
    return shapes


_MLX_ATTENTION = {"n_heads_in_group", "no_op", "num_sink_tokens", "replace_with_linear", "sparsify"} | {
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
    "window_length",
}
_MLX_FFN = {"ffn_mult", "no_op", "replace_with_linear", "sparsify"}
_MLX_ACTIVATIONS = {"silu", "relu", "gelu", "gelu_new", "gelu_fast"}


def mlx_lm(config_json: Mapping[str, Any]) -> Shapes:
    """Load as mlx-lm: fixed fields a block, `ffn_mult` alone, heads share hidden, one switch for attention's biases."""
    hidden, heads = config_json["hidden_size"], config_json["num_attention_heads"]
    scaling = config_json["rope_scaling"]
    if scaling and not {"factor", "rope_type"} <= scaling.keys():
        raise RefusedError("rope_scaling must have factor and rope_type")
    if len(config_json["block_configs"]) != config_json["num_hidden_layers"]:
        raise RefusedError("num_hidden_layers is not the number of block_configs")
    bias, head_dim = config_json["attention_bias"], hidden // heads
    biases = {"qkv_bias": bias, "output_bias": bias}
    if all(block["attention"]["no_op"] for block in config_json["block_configs"]):
        raise RefusedError("the mask is made from the first cache, and there is none")
    shapes = _around(config_json["vocab_size"], hidden, config_json["tie_word_embeddings"])
    for index, block in enumerate(config_json["block_configs"]):
        prefix, attention, ffn = f"model.layers.{index}", block["attention"], block["ffn"]
        if unknown := (attention.keys() - _MLX_ATTENTION) | (ffn.keys() - _MLX_FFN):
            raise RefusedError(f"block {index}: unknown fields {sorted(unknown)}")
        if not attention["no_op"]:
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            if attention["replace_with_linear"]:
                shapes |= _linear(f"{prefix}.self_attn.linear", hidden, hidden, bias)
            elif head_dim * heads != hidden:
                raise RefusedError("hidden_size must be divisible by num_attention_heads")
            else:
                kv_heads = heads // attention["n_heads_in_group"]
                shapes |= _attention(f"{prefix}.self_attn", hidden, heads, kv_heads, head_dim, **biases)
        if not ffn["no_op"]:
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            if ffn["replace_with_linear"]:
                shapes |= _linear(f"{prefix}.mlp.linear", hidden, hidden, config_json["mlp_bias"])
            elif ffn["ffn_mult"] is None or config_json["hidden_act"] not in _MLX_ACTIVATIONS:
                raise RefusedError(f"block {index}: no ffn_mult, or the activation {config_json['hidden_act']!r}")
            else:
                width = _width(round(ffn["ffn_mult"], 6), hidden)  # it keeps six digits
                shapes |= _ffn(f"{prefix}.mlp", hidden, width, config_json["mlp_bias"])
    return shapes


def _head_dim(config: NemotronNasConfig) -> int:
    """Return the head dimension of the config, which our class always sets."""
    return int(config.head_dim)


def _needed(ffn: Any, name: str, index: int) -> Any:
    value = getattr(ffn, name, None)
    if value is None:
        raise RefusedError(f"block {index}: its FFN has no {name}")
    return value


def _silu_only(activation: str) -> None:
    if activation != "silu":
        raise RefusedError(f"computes SiLU, not {activation}")


LOADERS: dict[Runtime, Callable[[Mapping[str, Any]], Shapes]] = {
    "vllm": vllm,
    "sglang": sglang,
    "tensorrt-llm": tensorrt_llm,
    "mlx-lm": mlx_lm,
}
