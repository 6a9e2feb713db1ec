"""config.json of a heterogeneous Llama in the nemotron-nas form, as a class: this file is part of the checkpoint.

The project that made the checkpoint wrote it, not NVIDIA. `block_configs` says what each block is; engines read
`block.attention.no_op`, `.n_heads_in_group`, `.replace_with_linear`, `block.ffn.no_op`, `.ffn_mult`,
`.intermediate_size`. Works with transformers 4.48 and newer, which have rotary parameters in two forms.
"""

from typing import Any, ClassVar

from transformers import PretrainedConfig

_DEFAULTS = {"hidden_size": 4096, "num_attention_heads": 32, "hidden_act": "silu"}
_OFF = {"attention_bias": False, "mlp_bias": False, "qk_norm": False, "tie_word_embeddings": False}


class JsonObject:
    """A JSON object with its fields as attributes.

    `ffn_mult: null` becomes no attribute: vLLM takes `ffn_mult` wherever it is one, else the exact `intermediate_size`.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self._names = tuple(fields)
        for name, value in fields.items():
            if name != "ffn_mult" or value is not None:
                setattr(self, name, JsonObject(value) if isinstance(value, dict) else value)

    def to_dict(self) -> dict[str, Any]:
        """Return the object as it was read, with the attributes that were set since."""
        fields = {name: getattr(self, name, None) for name in self._names}
        return {name: value.to_dict() if isinstance(value, JsonObject) else value for name, value in fields.items()}


class NemotronNasConfig(PretrainedConfig):
    """A Llama config whose blocks differ: `num_key_value_heads` and `intermediate_size` are null, each has its own.

    `attention_bias` is the output projection's, `qkv_bias` that of q, k and v; `qk_norm` normalises heads as a Qwen3.
    """

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        block_configs: Any = (),
        max_position_embeddings: int = 8192,
        rope_parameters: dict[str, Any] | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        dtype: Any = None,
        **fields: Any,
    ) -> None:
        self.block_configs: list[Any] = [
            JsonObject(block) if isinstance(block, dict) else block for block in block_configs
        ]
        self.max_position_embeddings = max_position_embeddings
        rope = dict(rope_parameters or rope_scaling or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
        rope.setdefault("rope_theta", rope_theta)
        self.rope_parameters = rope  # transformers 5 and newer engines read this,
        self.rope_theta = rope["rope_theta"]  # older ones these two; in transformers 5 rope_scaling is a property
        if not isinstance(getattr(type(self), "rope_scaling", None), property):
            self.rope_scaling = self.scaling()
        fields = {**_DEFAULTS, **_OFF, **fields}
        fields.setdefault("qkv_bias", fields["attention_bias"])
        fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        if dtype is not None:
            fields["torch_dtype"] = dtype  # the name that every version takes
        super().__init__(**fields)

    def scaling(self) -> dict[str, Any] | None:
        """Return the rotary parameters in the form of transformers 4: without theta, None where nothing is scaled."""
        scaling = {name: value for name, value in self.rope_parameters.items() if name != "rope_theta"}
        return None if scaling == {"rope_type": "default"} else scaling

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of config.json, with both forms of the rotary parameters."""
        blocks = [block.to_dict() if isinstance(block, JsonObject) else block for block in self.block_configs]
        return {**super().to_dict(), "rope_scaling": self.scaling(), "block_configs": blocks}
