"""The geometry of a Llama-like decoder, read from a Hugging Face config.json without importing torch.

Supported parents: Llama (SmolLM2 included), Mistral, Qwen2: RMSNorm before each subblock, rotary positions,
grouped-query or multi-head attention with optional biases, a gated FFN. Everything else is refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from storage.files import InputError
from storage.records import Attention, Ffn

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
_REFUSED = {
    "Qwen3ForCausalLM": "it normalises queries and keys (qk-norm), which no heterogeneous format expresses",
    "Phi3ForCausalLM": "its q/k/v and gate/up projections are fused; convert it to the Llama form first",
    "MixtralForCausalLM": "its FFN is a mixture of experts",
    "Qwen2MoeForCausalLM": "its FFN is a mixture of experts",
    "Gemma2ForCausalLM": "it normalises after each subblock as well and caps its logits",
    "Gemma3ForCausalLM": "it normalises after each subblock as well and mixes local with global attention",
    "Olmo2ForCausalLM": "it normalises after each subblock instead of before",
    "SmolLM3ForCausalLM": "some of its blocks have no rotary positions",
    "GPT2LMHeadModel": "its FFN is not gated and its positions are learned",
    "OPTForCausalLM": "its FFN is not gated and its positions are learned",
}


@dataclass(frozen=True)
class ModelConfig:
    """What the method needs to know of a parent; sizes in elements, `context` in tokens.

    `rope` is in the form of transformers 5: {"rope_type", "rope_theta", and the type's own fields}. `context` is
    the longest sequence on which full attention is what the parent computes (its sliding window, if it has one).
    """

    architecture: str
    hidden_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: dict[str, Any]
    context: int
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> Self:
        """Read config.json of a supported parent; `where` is named in errors.

        Raises:
            InputError: another architecture (with the reason), a missing field, sizes that do not fit together.
        """
        architecture = (config.get("architectures") or ["(none named)"])[0]
        if architecture not in SUPPORTED:
            reason = _REFUSED.get(architecture, "its blocks are not known to be Llama-like")
            raise InputError(
                f"{where}: architecture {architecture} is not supported: {reason}. Supported: {', '.join(SUPPORTED)}"
            )
        kind = architecture.removesuffix("ForCausalLM").lower()
        if config.get("model_type", kind) != kind:
            raise InputError(f"{where}: model_type is {config['model_type']!r}, but the architecture is {architecture}")
        missing = [key for key in _REQUIRED if not isinstance(config.get(key), int | float) or config[key] <= 0]
        if missing:
            raise InputError(
                f"{where}: config.json of a {architecture} must have numbers above 0 for {', '.join(missing)}"
            )
        heads = int(config["num_attention_heads"])
        bias = bool(config.get("attention_bias", False))
        window = config.get("sliding_window")
        if architecture == "Qwen2ForCausalLM" and not config.get("use_sliding_window", False):
            window = None
        context = int(config["max_position_embeddings"])
        result = cls(
            architecture=architecture,
            hidden_size=int(config["hidden_size"]),
            num_blocks=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope=_rope(config, where),
            context=min(context, int(window)) if window else context,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "Qwen2ForCausalLM" or (architecture == "LlamaForCausalLM" and bias),
            output_bias=architecture == "LlamaForCausalLM" and bias,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(config.get("mlp_bias", False)),
            activation=_activation(config, where),
        )
        if result.num_heads % result.num_kv_heads:
            raise InputError(
                f"{where}: {result.num_heads} attention heads cannot share {result.num_kv_heads} kv heads evenly"
            )
        return result

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`."""
        return cls(**value)


_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
)


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary parameters in the form of transformers 5, from that form or from rope_theta + rope_scaling (4.x)."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected an object for the rope parameters, found {found!r}")
    rope = dict(found)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.pop("type", None)
    if rope["rope_type"] in ("llama3", "yarn") and "max_position_embeddings" in config:  # as transformers fills it in
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    if rope["rope_type"] not in ROPE_TYPES:
        raise InputError(
            f"{where}: rope type {rope['rope_type']!r} is not supported: it is not one of {', '.join(ROPE_TYPES)}"
        )
    needed = ("rope_theta", *_ROPE_FIELDS.get(rope["rope_type"], ()))
    if wrong := [key for key in needed if not isinstance(rope.get(key), int | float) or rope[key] <= 0]:
        raise InputError(
            f"{where}: rope parameters of type {rope['rope_type']} must have numbers above 0 for {', '.join(wrong)}"
        )
    return rope


_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_UNSAID = ("attention_factor", "mscale", "mscale_all_dim", "truncate")


def unsaid_by_gguf(rope: Mapping[str, Any]) -> list[str]:
    """Settings of yarn that a GGUF file has no key for."""
    return [key for key in _UNSAID if rope["rope_type"] == "yarn" and rope.get(key) is not None]


def _activation(config: Mapping[str, Any], where: str) -> str:
    """Of the gated FFN."""
    name = str(config.get("hidden_act", "silu"))
    if name not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act {name!r} is not supported: it is not one of {', '.join(ACTIVATIONS)}")
    return name


def expected_shapes(
    config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of these blocks must have; None: the parent's own."""
    hidden, dim = config.hidden_size, config.head_dim
    if blocks is None:
        blocks = [(Attention("gqa", config.num_kv_heads), Ffn("gated", config.intermediate_size))] * config.num_blocks
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for block_index, (attention, ffn) in enumerate(blocks):
        queries, keys, width = config.num_heads * dim, attention.num_kv_heads * dim, ffn.intermediate_size
        linears: dict[str, tuple[int, int, bool]] = {}
        if attention.kind == "linear":
            linears["self_attn.linear_attn"] = (hidden, hidden, False)
        elif attention.kind == "gqa":
            linears["self_attn.q_proj"] = (queries, hidden, config.qkv_bias)
            linears["self_attn.k_proj"] = linears["self_attn.v_proj"] = (keys, hidden, config.qkv_bias)
            linears["self_attn.o_proj"] = (hidden, queries, config.output_bias)
        if ffn.kind == "linear":
            linears["mlp.linear_mlp"] = (hidden, hidden, False)
        elif ffn.kind == "gated":
            linears["mlp.gate_proj"] = linears["mlp.up_proj"] = (width, hidden, config.mlp_bias)
            linears["mlp.down_proj"] = (hidden, width, config.mlp_bias)
        prefix = f"model.layers.{block_index}"
        if attention.kind != "no_op":
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        if ffn.kind != "no_op":
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
    shapes[NORM] = (hidden,)
    if not config.tie_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


NEMOTRON_NAS = "nemotron-nas"
CHILD_ARCHITECTURE = "DeciLMForCausalLM"
_FFN_MULTIPLE = 256  # engines that read ffn_mult round the width to it (docs/runtimes.md)


def ffn_mult(intermediate_size: int, hidden_size: int) -> float | None:
    """The multiplier from which engines compute this FFN width, None where their formula cannot give it.

    Engines compute round_up_256(int(2 * ffn_mult * hidden / 3)), the Llama rule of DeciLM's configs.
    """
    multiplier = 3 * intermediate_size / (2 * hidden_size)
    for candidate in (multiplier, multiplier * (1 + 1e-9)):
        base = int(2 * candidate * hidden_size / 3)
        if -(-base // _FFN_MULTIPLE) * _FFN_MULTIPLE == intermediate_size:
            return candidate
    return None


def _block_config(config: ModelConfig, attention: Attention, ffn: Ffn) -> dict[str, Any]:
    heads = config.num_heads // attention.num_kv_heads if attention.kind == "gqa" else None
    width = ffn.intermediate_size or None
    multiplier = ffn_mult(width, config.hidden_size) if width else None
    exact = {"intermediate_size": width} if width and multiplier is None else {}  # mlx-lm refuses a key it has not
    return {
        "attention": {
            "n_heads_in_group": heads,
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


def to_nemotron_nas(
    config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]], special_tokens: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """config.json of a child in the nemotron-nas form (docs/runtimes.md).

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
        **_common(config),
        "attention_bias": config.output_bias,
        "qkv_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        **special_tokens,
        "dtype": dtype,
        "block_configs": [_block_config(config, attention, ffn) for attention, ffn in blocks],
    }


def to_llama(
    config: ModelConfig, blocks: tuple[int, Attention, Ffn], special_tokens: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """config.json of a model of so many equal blocks, in the form of its family.

    A parent whose q, k and v alone have biases is a Qwen2; every other one can be said as a Llama or a Mistral.
    """
    count, attention, ffn = blocks
    architecture = "LlamaForCausalLM" if config.architecture not in SUPPORTED else config.architecture
    if config.qkv_bias and not config.output_bias:
        architecture = "Qwen2ForCausalLM"
    own: dict[str, dict[str, Any]] = {
        "LlamaForCausalLM": {"attention_bias": config.output_bias, "mlp_bias": config.mlp_bias},
        "MistralForCausalLM": {"sliding_window": None},
        "Qwen2ForCausalLM": {"use_sliding_window": False},
    }
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": count,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": ffn.intermediate_size,
        **_common(config),
        **own[architecture],
        **special_tokens,
        "dtype": dtype,
    }


def _common(config: ModelConfig) -> dict[str, Any]:
    """Fields that every form has; `rope_theta` and `rope_scaling` repeat `rope_parameters` for older readers."""
    scaling = {key: value for key, value in config.rope.items() if key != "rope_theta"}
    return {
        "vocab_size": config.vocab_size,
        "hidden_act": config.activation,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.context,
        "rope_parameters": dict(config.rope),  # transformers writes into what it is given
        "rope_theta": config.rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        "tie_word_embeddings": config.tie_embeddings,
    }


def from_nemotron_nas(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, list[tuple[Attention, Ffn]]]:
    """Geometry and blocks of a nemotron-nas config.json, ours or another's.

    Raises:
        InputError: it is not in that form, with the field that is wrong.
    """
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        blocks = [
            (_attention_from(block["attention"], heads), _ffn_from(block["ffn"], hidden))
            for block in config["block_configs"]
        ]
        geometry = ModelConfig(
            architecture=CHILD_ARCHITECTURE,
            hidden_size=hidden,
            num_blocks=len(blocks),
            num_heads=heads,
            num_kv_heads=max((attention.num_kv_heads for attention, _ in blocks), default=0),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate_size=max((ffn.intermediate_size for _, ffn in blocks), default=0),
            vocab_size=int(config["vocab_size"]),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope=_rope(config, where),
            context=int(config["max_position_embeddings"]),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bool(config.get("qkv_bias", config.get("attention_bias", False))),
            output_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            activation=_activation(config, where),
        )
        count = int(config.get("num_hidden_layers", len(blocks)))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AssertionError) as error:
        raise InputError(f"{where}: not a nemotron-nas config.json ({type(error).__name__}: {error})") from error
    if count != len(blocks):
        raise InputError(f"{where}: num_hidden_layers is {count} but block_configs has {len(blocks)}")
    return geometry, blocks


def from_config_json(raw: Any, where: str) -> tuple[ModelConfig, list[tuple[Attention, Ffn]]]:
    """Geometry and blocks of a nemotron-nas, Llama, Mistral or Qwen2 config.json; `where` is named in errors.

    Raises:
        InputError: it is of another kind, or wrong.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    if "block_configs" in raw or CHILD_ARCHITECTURE in (raw.get("architectures") or []):
        return from_nemotron_nas(raw, where)
    config = ModelConfig.from_hf(raw, where)
    own = (Attention("gqa", config.num_kv_heads), Ffn("gated", config.intermediate_size))
    return config, [own] * config.num_blocks


_BEYOND = ("window_length", "num_sink_tokens", "sparsify", "unshifted_sink", "use_prefill_window_in_sink_attention")
"""Fields of others' block_configs that change what a block computes, and that no runtime named here reads."""


def _attention_from(attention: Mapping[str, Any], num_heads: int) -> Attention:
    _refuse_beyond(attention)
    if attention.get("no_op"):
        return Attention("no_op")
    if attention.get("replace_with_linear"):
        return Attention("linear")
    group = int(attention["n_heads_in_group"])
    if group <= 0 or num_heads % group:
        raise ValueError(f"n_heads_in_group {group} does not divide {num_heads} heads")
    return Attention("gqa", num_heads // group)


def _refuse_beyond(half: Mapping[str, Any]) -> None:
    if found := [key for key in _BEYOND if half.get(key)]:
        raise ValueError(f"{', '.join(found)} is set, which is not supported")


def _ffn_from(ffn: Mapping[str, Any], hidden_size: int) -> Ffn:
    _refuse_beyond(ffn)
    if ffn.get("no_op"):
        return Ffn("no_op")
    if ffn.get("replace_with_linear"):
        return Ffn("linear")
    exact = ffn.get("intermediate_size")
    base = int(exact) if exact else int(2 * float(ffn["ffn_mult"]) * hidden_size / 3)
    width = base if exact else -(-base // _FFN_MULTIPLE) * _FFN_MULTIPLE
    if width <= 0:
        raise ValueError(f"an FFN of width {width}")
    return Ffn("gated", width)
