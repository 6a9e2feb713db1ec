"""The geometry of a Llama-like decoder, read from and written to a Hugging Face config.json without importing torch.

Supported parents are the rows of FAMILIES: Llama (SmolLM2 included), Mistral, Qwen2, Qwen3. All have RMSNorm before
each subblock, rotary positions, grouped-query or multi-head attention with optional biases, and a gated FFN; Qwen3 also
normalises each head's queries and keys. Every other architecture is refused by name. A family that differs in these
alone is one more row; one with other tensors or another computation changes :func:`expected_shapes` and
tasks/puzzle/model as well. Children, whose blocks differ, have a config.json of their own (storage/nemotron_nas.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from storage.config_fields import MAX_BLOCKS, MAX_TOKENS, MAX_VOCABULARY, Fields, is_number
from storage.files import InputError
from storage.variants import Attention, Ffn

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of parents: what its config.json means beyond the fields that all families share.

    Attributes:
        qkv_bias: whether q, k and v have biases: the same for the whole family, or the field that says so.
        output_bias: whether the output projection of attention has a bias, in the same form.
        mlp_bias: whether the projections of the FFN have biases, in the same form.
        qk_norm: whether an RMSNorm over each head of queries and keys comes before the rotary positions.
        default_head_dim: elements of a head where config.json says nothing of it, as transformers has it; None: the
            heads' share of the hidden size.
        window_switch: the field that turns `sliding_window` on; None: the window holds wherever it is set.
        default_window: tokens of the window where config.json says nothing of it, as transformers has it; None: full.
        full_attention: fields of a config.json that is written, which say that there is no sliding window.
    """

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    default_head_dim: int | None = None
    window_switch: str | None = None
    default_window: int | None = None
    full_attention: Mapping[str, bool | None] = field(default_factory=dict)


_LLAMA, _QWEN2, _QWEN3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
FAMILIES: Mapping[str, Family] = {
    _LLAMA: Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(default_window=4096, full_attention={"sliding_window": None}),
    _QWEN2: Family(
        qkv_bias=True,
        window_switch="use_sliding_window",
        default_window=4096,
        full_attention={"use_sliding_window": False},
    ),
    _QWEN3: Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        default_head_dim=128,
        window_switch="use_sliding_window",
        default_window=4096,
        full_attention={"use_sliding_window": False},
    ),
}
"""The supported parents, by the name of their architecture."""

REFUSED_FAMILIES: Mapping[str, str] = {
    "Phi3ForCausalLM": "its q/k/v and gate/up projections are fused; convert it to the Llama form first",
    "MixtralForCausalLM": "its FFN is a mixture of experts",
    "Qwen2MoeForCausalLM": "its FFN is a mixture of experts",
    "Qwen3MoeForCausalLM": "its FFN is a mixture of experts",
    "Gemma2ForCausalLM": "it normalises after each subblock as well and caps its logits",
    "Gemma3ForCausalLM": "it normalises after each subblock as well and mixes local with global attention",
    "Olmo2ForCausalLM": "it normalises after each subblock instead of before",
    "GraniteForCausalLM": "it scales embeddings, residuals, attention and logits",
    "SmolLM3ForCausalLM": "some of its blocks have no rotary positions",
    "GPT2LMHeadModel": "its FFN is not gated and its positions are learned",
    "OPTForCausalLM": "its FFN is not gated and its positions are learned",
}
"""Why well-known architectures are refused, by their names."""

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
"""Activations of a gated FFN, by their names in config.json."""
_ORIGINAL_CONTEXT = "original_max_position_embeddings"
_ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL_CONTEXT),
    "yarn": ("factor", _ORIGINAL_CONTEXT),
}
"""Supported types of rotary positions, with the numbers that a type needs besides rope_theta."""
ROPE_TYPES = tuple(_ROPE_FIELDS)
_ROPE_NUMBERS = (
    *{name for names in _ROPE_FIELDS.values() for name in names},
    *("rope_theta", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
"""Fields of rotary positions that are numbers where they are there."""
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WITHOUT_GGUF_KEY = ("attention_factor", "mscale", "mscale_all_dim", "truncate")
"""Settings of yarn that a GGUF file has no key for."""
_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
)
"""Fields of every family's config.json that must be numbers above 0."""


@dataclass(frozen=True)
class ModelConfig:
    """The geometry of a model as the method needs it; sizes in elements, `context` in tokens.

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
    qk_norm: bool
    activation: str

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> Self:
        """Read config.json of a supported parent; `where` is named in errors.

        Raises:
            InputError: another architecture (with the reason), a field that is missing or of another type, sizes that
                are out of bounds or do not fit together.
        """
        fields = Fields(config, where)
        architecture = _architecture(config)
        _check_supported(architecture, config, where)
        refuse_other_attention(fields)
        family, heads = FAMILIES[architecture], fields.count("num_attention_heads")
        geometry = cls(
            architecture=architecture,
            hidden_size=fields.count("hidden_size"),
            num_blocks=fields.count("num_hidden_layers", MAX_BLOCKS),
            num_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", default=heads),
            head_dim=read_head_dim(fields, family.default_head_dim),
            intermediate_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size", MAX_VOCABULARY),
            rms_norm_eps=fields.number("rms_norm_eps", 1),
            rope=read_rope(config, where),
            context=_full_attention_context(family, fields),
            tie_embeddings=fields.switch("tie_word_embeddings"),
            qkv_bias=_has_bias(family.qkv_bias, fields),
            output_bias=_has_bias(family.output_bias, fields),
            mlp_bias=_has_bias(family.mlp_bias, fields),
            qk_norm=family.qk_norm,
            activation=read_activation(config, where),
        )
        if geometry.num_heads % geometry.num_kv_heads:
            raise InputError(
                f"{where}: {geometry.num_heads} attention heads cannot share {geometry.num_kv_heads} kv heads evenly"
            )
        return geometry

    def to_json(self) -> dict[str, Any]:
        """Return the geometry as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Invert :meth:`to_json`."""
        return cls(**value)


def _architecture(config: Mapping[str, Any]) -> str:
    """Return the name of the architecture in a config.json."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "(none named)"


def _check_supported(architecture: str, config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for an architecture that is no row of FAMILIES, or a config.json that does not fit its own."""
    if architecture not in FAMILIES:
        reason = REFUSED_FAMILIES.get(architecture, "its blocks are not known to be Llama-like")
        raise InputError(
            f"{where}: architecture {architecture} is not supported: {reason}. Supported: {', '.join(FAMILIES)}"
        )
    model_type = _model_type(architecture)
    if config.get("model_type", model_type) != model_type:
        raise InputError(f"{where}: model_type is {config['model_type']!r}, but the architecture is {architecture}")
    missing = [key for key in _REQUIRED if not is_number(config.get(key)) or config[key] <= 0]
    if missing:
        raise InputError(f"{where}: config.json of a {architecture} must have numbers above 0 for {', '.join(missing)}")


def refuse_other_attention(fields: Fields) -> None:
    """Raise InputError for fields with which transformers computes another attention, or layers that differ."""
    if not fields.switch("is_causal", default=True):
        raise InputError(
            f"{fields.where}: is_causal is false: attention sees later tokens too, as in models of embeddings; "
            "expected a model that predicts the next token"
        )
    for key in ("per_layer_config", "block_configs"):  # storage/block_configs.py reads them
        if fields.values.get(key):
            raise InputError(
                f"{fields.where}: {key} is set, which is not supported here: its layers must be alike; if they are, "
                "`puzzle export --formats plain` writes it without"
            )


def _model_type(architecture: str) -> str:
    """Return the field `model_type` of an architecture's config.json."""
    return architecture.removesuffix("ForCausalLM").lower()


def read_head_dim(fields: Fields, default: int | None = None) -> int:
    """Return the size of an attention head: `head_dim`, or `default`; None: the heads' share of the hidden size.

    Raises:
        InputError: the heads do not share the hidden size evenly, or the size is odd, which rotary positions cannot be.
    """
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if fields.values.get("head_dim") is None and default is None and hidden % heads:
        raise InputError(f"{fields.where}: {heads} attention heads cannot share a hidden size of {hidden} evenly")
    head_dim = fields.count("head_dim", default=default or hidden // heads)
    if head_dim % 2:
        raise InputError(f"{fields.where}: the head_dim {head_dim} is odd, rotary positions take pairs of elements")
    return head_dim


def special_token_ids(config: Mapping[str, Any], where: str) -> dict[str, int | list[int] | None]:
    """Return the token ids of a config.json by key, those that it has of bos, eos and pad.

    Raises:
        InputError: one of them is no token id, nor a list of them or null.
    """
    ids = {key: config[key] for key in _SPECIAL_TOKENS if key in config}
    for key, value in ids.items():
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(
            isinstance(index, int) and -1 <= index <= MAX_TOKENS and not isinstance(index, bool) for index in listed
        ):
            raise InputError(f"{where}: {key} is no token id, nor a list of them or null")
    return ids


def _has_bias(setting: bool | str, fields: Fields) -> bool:
    """Tell whether projections have biases, from a family's setting for them."""
    return setting if isinstance(setting, bool) else fields.switch(setting)


def _full_attention_context(family: Family, fields: Fields) -> int:
    """Return the number of tokens of the longest sequence on which the parent's attention is full."""
    context = fields.count("max_position_embeddings", MAX_TOKENS)
    if family.window_switch and not fields.switch(family.window_switch):
        return context
    window = family.default_window if "sliding_window" not in fields.values else None
    return min(context, fields.count("sliding_window", MAX_TOKENS, default=window or context))


def read_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return rotary parameters in transformers 5's form, from that form or from rope_theta + rope_scaling (4.x).

    Raises:
        InputError: another type than the supported ones, or a number that the type needs is missing.
    """
    rope = dict(_given_rope(Fields(config, where)))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.pop("type", None)
    rope = {key: value for key, value in rope.items() if key != "partial_rotary_factor" or value is not None}
    if rope.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1) != 1:
        raise InputError(f"{where}: partial_rotary_factor is set, which is not supported: all of a head must turn")
    if rope["rope_type"] in ("llama3", "yarn"):  # as transformers fills it in: the field outside of these counts first
        if _ORIGINAL_CONTEXT in config:
            rope[_ORIGINAL_CONTEXT] = config[_ORIGINAL_CONTEXT]
        elif "max_position_embeddings" in config:
            rope.setdefault(_ORIGINAL_CONTEXT, config["max_position_embeddings"])
    if rope["rope_type"] not in ROPE_TYPES:
        raise InputError(
            f"{where}: rope type {rope['rope_type']!r:.80} is not supported: it is not one of {', '.join(ROPE_TYPES)}"
        )
    needed = {"rope_theta", *_ROPE_FIELDS[rope["rope_type"]]}
    present_keys = {key for key in _ROPE_NUMBERS if rope.get(key) is not None}
    wrong = sorted(key for key in needed | present_keys if not is_number(rope.get(key)) or not 0 < rope[key] <= 1e15)
    if wrong:
        raise InputError(
            f"{where}: rope parameters of type {rope['rope_type']} must have numbers above 0 for {', '.join(wrong)}"
        )
    layered = [key for key, value in rope.items() if isinstance(value, dict | list)]
    if layered:
        raise InputError(f"{where}: rope parameters that differ by layer ({layered[0]:.40}) are not supported")
    if rope["rope_theta"] <= 1 or (rope.get("factor") or 1) < 1:
        raise InputError(f"{where}: rope parameters must have a rope_theta above 1, and a factor of at least 1")
    if rope["rope_type"] == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise InputError(f"{where}: high_freq_factor of the rope parameters must be above low_freq_factor")
    return rope


def _given_rope(fields: Fields) -> Mapping[str, Any]:
    """Return the object that holds a config.json's rope parameters, the older one of two; empty: there is none."""
    names = [name for name in ("rope_scaling", "rope_parameters") if fields.values.get(name) is not None]
    settings = [fields.inner(fields.values[name], name).values for name in names]
    return next(filter(None, settings), {})


def rope_without_gguf_key(rope: Mapping[str, Any]) -> list[str]:
    """Return names of the rotary settings of a model (all of yarn) that a GGUF file has no key for."""
    return [key for key in _WITHOUT_GGUF_KEY if rope["rope_type"] == "yarn" and rope.get(key) is not None]


def read_activation(config: Mapping[str, Any], where: str) -> str:
    """Return the activation of the gated FFN.

    Raises:
        InputError: it is none of ACTIVATIONS.
    """
    name = Fields(config, where).text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise InputError(
            f"{where}: hidden_act {name!r:.80} is not supported: it is not one of {', '.join(ACTIVATIONS)}"
        )
    return name


def to_hf(
    config: ModelConfig,
    num_blocks: int,
    block: tuple[Attention, Ffn],
    special_tokens: Mapping[str, Any],
    dtype: str,
) -> dict[str, Any]:
    """Return the config.json of a model of equal blocks, in the form of its family.

    A model with qk-norm becomes a Qwen3; one whose q, k and v alone have biases a Qwen2; any other one of no supported
    family a Llama. What no family can express the caller has refused.
    """
    attention, ffn = block
    architecture = config.architecture if config.architecture in FAMILIES else _LLAMA
    if config.qk_norm:
        architecture = _QWEN3
    elif config.qkv_bias and not config.output_bias:
        architecture = _QWEN2
    family = FAMILIES[architecture]
    biases = {family.output_bias: config.output_bias, family.mlp_bias: config.mlp_bias}
    return {
        "architectures": [architecture],
        "model_type": _model_type(architecture),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": ffn.intermediate_size,
        **common_fields(config),
        **{name: value for name, value in biases.items() if isinstance(name, str)},
        **family.full_attention,
        **special_tokens,
        "dtype": dtype,
    }


def common_fields(config: ModelConfig) -> dict[str, Any]:
    """Return what is in every config.json; `rope_theta`, `rope_scaling` repeat `rope_parameters` for older readers."""
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


def expected_shapes(
    config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a model of these blocks must have; None: the parent's own."""
    hidden = config.hidden_size
    if blocks is None:
        blocks = [(Attention("gqa", config.num_kv_heads), Ffn("gated", config.intermediate_size))] * config.num_blocks
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for block_index, (attention, ffn) in enumerate(blocks):
        prefix = f"model.layers.{block_index}"
        if attention.kind != "no_op":
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        if attention.kind == "gqa" and config.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
        if ffn.kind != "no_op":
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, (rows, columns, has_bias) in _linear_layers(config, attention, ffn).items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
    shapes[NORM] = (hidden,)
    if not config.tie_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def _linear_layers(config: ModelConfig, attention: Attention, ffn: Ffn) -> dict[str, tuple[int, int, bool]]:
    """Return name -> rows, columns and whether there is a bias, of the linear layers in a block."""
    hidden, width = config.hidden_size, ffn.intermediate_size
    queries, keys = config.num_heads * config.head_dim, attention.num_kv_heads * config.head_dim
    layers: dict[str, tuple[int, int, bool]] = {}
    if attention.kind == "linear":
        layers["self_attn.linear_attn"] = (hidden, hidden, False)
    elif attention.kind == "gqa":
        layers["self_attn.q_proj"] = (queries, hidden, config.qkv_bias)
        layers["self_attn.k_proj"] = layers["self_attn.v_proj"] = (keys, hidden, config.qkv_bias)
        layers["self_attn.o_proj"] = (hidden, queries, config.output_bias)
    if ffn.kind == "linear":
        layers["mlp.linear_mlp"] = (hidden, hidden, False)
    elif ffn.kind == "gated":
        layers["mlp.gate_proj"] = layers["mlp.up_proj"] = (width, hidden, config.mlp_bias)
        layers["mlp.down_proj"] = (hidden, width, config.mlp_bias)
    return layers
