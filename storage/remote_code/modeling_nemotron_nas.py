"""A heterogeneous Llama: blocks differ in kv heads and FFN width, or have a linear layer or nothing in a half's place.

This file is part of the checkpoint; the project that made the checkpoint wrote it, not NVIDIA. The parts are
transformers' own Llama (4.48 or newer). A removed half has no tensors, its norm included; only blocks with attention
have a layer in the KV cache, numbered without holes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from .configuration_nemotron_nas import NemotronNasConfig


class DeciLMBlock(nn.Module):
    """hidden + attention(norm(hidden)), then + FFN(norm(.)); either half may be linear or absent."""

    def __init__(self, config: NemotronNasConfig, attention: Any, ffn: Any, cache_index: int) -> None:
        super().__init__()
        self.attention, self.ffn, size = attention, ffn, config.hidden_size
        llama_config: Any = copy.copy(config)  # this block's sizes, and a field that ours lacks
        llama_config.attention_dropout, llama_config.attention_bias = 0.0, config.qkv_bias
        if not attention.no_op:
            self.input_layernorm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
            self.self_attn: Any
            if attention.replace_with_linear:
                self.self_attn = nn.ModuleDict({"linear_attn": nn.Linear(size, size, bias=False)})
            else:
                llama_config.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
                self.self_attn = LlamaAttention(llama_config, cache_index)
                if config.qk_norm:
                    self.self_attn = _qwen3_attention(llama_config, cache_index)
                heads = config.num_attention_heads * config.head_dim
                self.self_attn.o_proj = nn.Linear(heads, size, bias=config.attention_bias)
        if not ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
            self.mlp: Any
            if ffn.replace_with_linear:
                self.mlp = nn.ModuleDict({"linear_mlp": nn.Linear(size, size, bias=False)})
            else:
                llama_config.intermediate_size = _width(ffn, size)
                self.mlp = LlamaMLP(llama_config)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: Cache | None, places: Tensor
    ) -> tuple[Tensor, Any]:
        """Return what both halves make, [batch, tokens, hidden] -> the same; attention's weights, where it keeps them.

        `places` are the positions of the tokens in the cache, which versions before 5 ask for.
        """
        weights = None
        if not self.attention.no_op:
            normed = self.input_layernorm(hidden)
            if self.attention.replace_with_linear:
                hidden = hidden + self.self_attn["linear_attn"](normed)
            else:  # by position: the cache's name differs between versions, and a wrong one is ignored
                attended, weights, *_ = self.self_attn(normed, rotary, mask, cache, cache_position=places)
                hidden = hidden + attended
        if not self.ffn.no_op:
            normed = self.post_attention_layernorm(hidden)
            hidden = hidden + (self.mlp["linear_mlp"](normed) if self.ffn.replace_with_linear else self.mlp(normed))
        return hidden, weights


def _qwen3_attention(config: Any, cache_index: int) -> Any:
    """Return attention with an RMSNorm over each head of queries and keys; its class is in transformers since 4.51."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    config.sliding_window, config.layer_types = None, ["full_attention"] * len(config.block_configs)
    return Qwen3Attention(config, cache_index)


def _width(ffn: Any, hidden_size: int) -> int:
    """Return channels of a gated FFN: as given, else DeciLM's rule round_up_256(int(2 * ffn_mult * hidden / 3))."""
    exact = getattr(ffn, "intermediate_size", None)
    return int(exact) if exact else -(-int(2 * ffn.ffn_mult * hidden_size / 3) // 256) * 256


def _mask(hidden: Tensor, places: Tensor, length: int, given: Tensor | None, sequences: Tensor | None) -> Tensor:
    """Return what scores get added, [batch or 1, heads or 1, tokens, length]: the lowest number where no key is seen.

    Not -inf: a padded position attends to nothing, and its softmax must not be NaN. `given`, [batch, seen + tokens], is
    0 where there is padding; one of four dimensions is the whole mask. `sequences` numbers the sequences that share a
    row.
    """
    lowest = torch.finfo(hidden.dtype).min
    if given is not None and given.dim() == 4:
        if given.is_floating_point():
            return given.to(hidden.device, hidden.dtype).clamp_min(lowest)
        allowed = given.to(hidden.device).bool()
    else:
        allowed = (torch.arange(length, device=hidden.device) <= places[:, None])[None, None]
        if given is not None:
            padding = functional.pad(given.to(hidden.device).bool(), (0, length - given.shape[1]))
            allowed = allowed & padding[:, None, None, :]
        if sequences is not None:
            allowed = allowed & (sequences[:, None, :, None] == sequences[:, None, None, :])
    return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, lowest)


def _length(cache: Any, end: Any) -> Any:
    """Return how many keys attention is given for tokens up to `end`: a static cache gives all that it has room for.

    Versions name its limit differently.
    """
    if not isinstance(cache, StaticCache):
        return end
    limit: Any = getattr(cache, "get_max_length", None) or getattr(cache, "get_max_cache_shape", None)
    return limit()


def _sequences(position_ids: Tensor) -> Tensor:
    """Return the number of the sequence of each token of a row: a new one begins where positions do not go on."""
    goes_on = position_ids[:, 1:] == position_ids[:, :-1] + 1
    return functional.pad((~goes_on).cumsum(-1), (1, 0))


def _kept(hidden: Tensor, positions: int | Tensor) -> Tensor:
    """Keep the last so many positions (0: all); or those positions themselves, for all rows, for each, or as a mask."""
    if not isinstance(positions, Tensor):
        return hidden[:, -positions:]
    if positions.dim() < 2:
        return hidden[:, positions.reshape(-1)]
    if positions.dtype == torch.bool:
        return hidden[positions]
    return hidden.take_along_dim(positions[:, :, None], 1)


class DeciLMPreTrainedModel(PreTrainedModel):
    """The facts that transformers asks of every model class."""

    config_class = NemotronNasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_cache_class = True  # versions before 5 ask


class DeciLMModel(DeciLMPreTrainedModel):
    """Embedding, blocks and final norm: token ids in, hidden states out."""

    def __init__(self, config: NemotronNasConfig) -> None:
        super().__init__(config)
        self._no_split_modules, self._skip_keys_device_placement = ["DeciLMBlock"], ["past_key_values"]
        self.gradient_checkpointing = False
        pairs = [(block.attention, block.ffn) for block in config.block_configs]
        cached = [not attention.no_op and not attention.replace_with_linear for attention, _ in pairs]
        blocks = [DeciLMBlock(config, *pair, cache_index=sum(cached[:index])) for index, pair in enumerate(pairs)]
        rope: Any = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=rope)
        PreTrainedModel.post_init(self)

    def get_input_embeddings(self) -> Any:
        """Return the embedding; transformers 4 asks by this name."""
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Put another embedding in its place."""
        self.embed_tokens = value

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
    ) -> Any:
        """Return hidden states behind the final norm, [batch, tokens, hidden]; on request those before all blocks."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, found both or neither; give one of them")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        again = self.gradient_checkpointing and self.training
        if again:  # a block that is computed again would be cached again
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        seen: Any = past_key_values.get_seq_length() if past_key_values is not None else 0
        places, sequences = seen + torch.arange(hidden.shape[1], device=hidden.device), None
        if position_ids is None:
            position_ids = places[None]
        elif attention_mask is None and past_key_values is None:
            sequences = _sequences(position_ids)
        length = _length(past_key_values, seen + hidden.shape[1])
        mask = _mask(hidden, places, length, attention_mask, sequences)
        rotary, before, weights = self.rotary_emb(hidden, position_ids), [], []
        for block in self.layers:
            before.append(hidden)
            inputs = (hidden, rotary, mask, past_key_values, places)
            hidden, attended = self._gradient_checkpointing_func(block.__call__, *inputs) if again else block(*inputs)
            weights.append(attended)
        hidden = self.norm(hidden)
        output = BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            output["hidden_states"] = (*before, hidden)
        if self.config.output_attentions if output_attentions is None else output_attentions:
            output["attentions"] = tuple(weights)
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


def _as_dict(config: Any, return_dict: bool | None) -> bool:
    """Tell whether an output is an object with names, not a tuple."""
    return bool(config.return_dict if return_dict is None else return_dict)


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):
    """The model, and a head that is tied to the embedding or not."""

    def __init__(self, config: NemotronNasConfig) -> None:
        super().__init__(config)
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.model = DeciLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        PreTrainedModel.post_init(self)

    def get_input_embeddings(self) -> Any:
        """Return the embedding; transformers 4 ties the head to it through these four."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Put another embedding in its place."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> Any:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Put another head in its place."""
        self.lm_head = new_embeddings

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
    ) -> Any:
        """Return logits, [batch, positions, vocabulary], and the LM loss where there are labels.

        `logits_to_keep`: so many last positions (0: all), or the positions themselves. Of `options`, transformers'
        loss reads its own (`num_items_in_batch`, ...), and DeciLMModel `output_hidden_states` and `output_attentions`.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        outputs = self.model(*inputs, return_dict=True, **options)
        logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if _as_dict(self.config, return_dict) else output.to_tuple()
