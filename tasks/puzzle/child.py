"""The heterogeneous model as a transformers class: `AutoModelForCausalLM` loads children once this is imported.

The checkpoint form is nemotron-nas (docs/runtimes.md); no remote code is needed in our own process. The KV cache and
`generate()` are transformers' own; only blocks with attention have a layer in the cache, numbered without holes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from storage.model_config import (
    CHILD_ARCHITECTURE,
    EMBEDDING,
    LM_HEAD,
    NEMOTRON_NAS,
    ModelConfig,
    from_nemotron_nas,
    to_nemotron_nas,
)
from storage.records import Attention, Ffn
from tasks.puzzle.blocks import Block, RMSNorm
from tasks.puzzle.device import Compute
from tasks.puzzle.rotary import RotaryEmbedding


class NemotronNasConfig(PreTrainedConfig):
    """config.json of a child; `block_configs` says what each block is."""

    model_type = NEMOTRON_NAS
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None


class DeciLMModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: NemotronNasConfig) -> None:
        super().__init__()
        geometry, blocks = from_nemotron_nas(config.to_dict(), "config.json")
        self.embed_tokens = nn.Embedding(geometry.vocab_size, geometry.hidden_size)
        with_attention = [attention.kind == "gqa" for attention, _ in blocks]
        self.layers = nn.ModuleList(
            Block(geometry, attention, ffn, cache_index=sum(with_attention[:index]))
            for index, (attention, ffn) in enumerate(blocks)
        )
        self.norm = RMSNorm(geometry.hidden_size, geometry.rms_norm_eps)
        self.rotary = RotaryEmbedding(geometry)


class DeciLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A child of Puzzle: blocks that differ in kv heads, FFN width, or lack a subblock."""

    config_class = NemotronNasConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: NemotronNasConfig) -> None:
        super().__init__(config)
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.model = DeciLMModel(config)
        self.lm_head = nn.Linear(
            self.model.embed_tokens.embedding_dim, self.model.embed_tokens.num_embeddings, bias=False
        )
        PreTrainedModel.post_init(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` positions (0: all), [batch, positions, vocabulary]."""
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.model.rotary(hidden, position_ids)
        for block in self.model.layers:
            hidden = block(hidden, rotary, mask, past_key_values)
        logits = self.lm_head(self.model.norm(hidden[:, -logits_to_keep:]))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


AutoConfig.register(NEMOTRON_NAS, NemotronNasConfig)
AutoModelForCausalLM.register(NemotronNasConfig, DeciLMForCausalLM)
assert DeciLMForCausalLM.__name__ == CHILD_ARCHITECTURE


def build(
    config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]], tensors: Mapping[str, Tensor], compute: Compute
) -> DeciLMForCausalLM:
    """A model in memory over `tensors` (names of the checkpoint), in the dtype and on the device of compute.

    Raises:
        RuntimeError: a tensor is missing, left over, or of another shape.
    """
    dtype = str(compute.dtype).removeprefix("torch.")
    with torch.device("meta"):
        model = DeciLMForCausalLM(NemotronNasConfig(**to_nemotron_nas(config, blocks, {}, dtype)))
    placed = {name: tensor.to(compute.device, compute.dtype) for name, tensor in tensors.items()}
    if config.tie_embeddings:
        placed[LM_HEAD] = placed[EMBEDDING]
    model.load_state_dict(placed, strict=True, assign=True)
    return model.requires_grad_(False)
