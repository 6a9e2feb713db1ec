"""The heterogeneous model as a transformers class: `AutoModelForCausalLM` loads children once this is imported.

The checkpoint form is nemotron-nas (docs/runtimes.md); no remote code is needed in our own process. The KV cache and
`generate()` come from transformers. Only blocks with attention have a layer in the cache, numbered without holes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from storage.model_config import EMBEDDING, LM_HEAD, ModelConfig
from storage.nemotron_nas import CHILD_ARCHITECTURE, NEMOTRON_NAS, from_nemotron_nas, to_nemotron_nas
from storage.variants import Attention, Ffn
from tasks.puzzle.model.blocks import Block, RMSNorm
from tasks.puzzle.model.device import Compute
from tasks.puzzle.model.rotary import RotaryEmbedding


class NemotronNasConfig(PreTrainedConfig):
    """config.json of a child; its `block_configs` say which variants each block has."""

    model_type = NEMOTRON_NAS
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None


class DeciLMBlock(Block, GradientCheckpointingLayer):
    """The block of every stage, whose activations training may compute a second time instead of keeping them."""


class DeciLMPreTrainedModel(PreTrainedModel):
    """The base that transformers asks of every model class."""

    config_class = NemotronNasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True


class DeciLMModel(DeciLMPreTrainedModel):
    """Embedding, blocks and final norm of a child: token ids in, hidden states out."""

    def __init__(self, config: NemotronNasConfig) -> None:
        super().__init__(config)
        geometry, blocks = from_nemotron_nas(config.to_dict(), "config.json")
        self.embed_tokens = nn.Embedding(geometry.vocab_size, geometry.hidden_size)
        with_attention = [attention.kind == "gqa" for attention, _ in blocks]
        self.layers = nn.ModuleList(
            DeciLMBlock(geometry, attention, ffn, cache_index=sum(with_attention[:index]))
            for index, (attention, ffn) in enumerate(blocks)
        )
        self.norm = RMSNorm(geometry.hidden_size, geometry.rms_norm_eps)
        self.rotary = RotaryEmbedding(geometry)
        self.gradient_checkpointing = False
        self._no_split_modules, self._skip_keys_device_placement = [DeciLMBlock.__name__], ["past_key_values"]
        PreTrainedModel.post_init(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Compute the hidden states behind the final norm, [batch, tokens, hidden]; on request those before each block.

        Raises:
            ValueError: there are both or neither of `input_ids` and `inputs_embeds`, or `output_attentions` is set.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, found both or neither; give one of them")
        if output_attentions:
            raise ValueError(
                "output_attentions: this class never has attention weights in memory; load an export of the child with "
                'trust_remote_code=True and attn_implementation="eager"'
            )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None  # a block that is computed again would be cached again
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = seen + torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=_in_dtype(attention_mask, hidden),
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary, before = self.rotary(hidden, position_ids), []
        for block in self.layers:
            before.append(hidden)
            hidden = block(hidden, rotary, mask, past_key_values)
        hidden = self.norm(hidden)
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*before, hidden) if with_states else None,
        )
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


def _in_dtype(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Cast a mask of four dimensions as attention takes it: boolean, or numbers of `hidden`'s dtype, none infinite."""
    if mask is None or mask.dim() < 4:
        return mask
    if not mask.is_floating_point():
        return mask.bool()
    return mask.to(hidden.dtype).clamp_min(torch.finfo(hidden.dtype).min)


def _as_dict(config: PreTrainedConfig, return_dict: bool | None) -> bool:
    """Tell whether an output is an object with names, not a tuple."""
    return bool(config.return_dict if return_dict is None else return_dict)


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):
    """A child of Puzzle: its blocks differ in kv heads or FFN width, or lack a subblock."""

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits, [batch, positions, vocabulary], and the LM loss where there are labels.

        `logits_to_keep`: so many last positions (0: all), or the positions themselves. Of `options`, transformers'
        loss reads its own (`num_items_in_batch`, ...), and :class:`DeciLMModel` `output_hidden_states`.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        outputs = self.model(*inputs, return_dict=True, **options)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


AutoConfig.register(NEMOTRON_NAS, NemotronNasConfig)
AutoModel.register(NemotronNasConfig, DeciLMModel)
AutoModelForCausalLM.register(NemotronNasConfig, DeciLMForCausalLM)
assert DeciLMForCausalLM.__name__ == CHILD_ARCHITECTURE


def build(
    config: ModelConfig, blocks: Sequence[tuple[Attention, Ffn]], tensors: Mapping[str, Tensor], compute: Compute
) -> DeciLMForCausalLM:
    """Build a model in memory, frozen.

    Args:
        config: geometry of the parent.
        blocks: attention and FFN variant of each block.
        tensors: the model's tensors by their names in a checkpoint.
        compute: the device and dtype of the model.

    Raises:
        RuntimeError: a tensor is missing, left over, or of another shape.
    """
    dtype = str(compute.dtype).removeprefix("torch.")
    with torch.device("meta"):
        model = DeciLMForCausalLM(NemotronNasConfig(**to_nemotron_nas(config, blocks, {}, dtype)))
    placed = {name: tensor.to(*compute) for name, tensor in tensors.items()}
    if config.tie_embeddings:
        placed[LM_HEAD] = placed[EMBEDDING]
    model.load_state_dict(placed, strict=True, assign=True)
    return model.requires_grad_(False)
