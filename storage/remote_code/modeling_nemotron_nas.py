"""A heterogeneous Llama: blocks differ in kv heads and FFN width, or have a linear layer or nothing in a half's place.

This file is part of the checkpoint; the project that made the checkpoint wrote it, not NVIDIA. The parts are
transformers' own Llama (4.48 or newer). A removed half has no tensors, its norm included; only blocks with attention
have a layer in the KV cache, numbered without holes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from .configuration_nemotron_nas import NemotronNasConfig


class DeciLMBlock(nn.Module):
    """hidden + attention(norm(hidden)), then + FFN(norm(.)); either half may be linear or absent."""

    def __init__(self, config: NemotronNasConfig, attention: Any, ffn: Any, cache_index: int) -> None:
        super().__init__()
        self.attention, self.ffn, size = attention, ffn, config.hidden_size
        own: Any = copy.copy(config)  # what Llama's parts read: this block's sizes, and a field that our config lacks
        own.attention_dropout, own.attention_bias = 0.0, config.qkv_bias
        if not attention.no_op:
            self.input_layernorm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
            self.self_attn: Any
            if attention.replace_with_linear:
                self.self_attn = nn.ModuleDict({"linear_attn": nn.Linear(size, size, bias=False)})
            else:
                own.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
                self.self_attn = LlamaAttention(own, cache_index)
                heads = config.num_attention_heads * config.head_dim
                self.self_attn.o_proj = nn.Linear(heads, size, bias=config.attention_bias)
        if not ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
            self.mlp: Any
            if ffn.replace_with_linear:
                self.mlp = nn.ModuleDict({"linear_mlp": nn.Linear(size, size, bias=False)})
            else:
                own.intermediate_size = _width(ffn, size)
                self.mlp = LlamaMLP(own)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: Cache | None) -> Tensor:
        """Both halves, [batch, tokens, hidden] -> the same shape."""
        if not self.attention.no_op:
            normed = self.input_layernorm(hidden)
            if self.attention.replace_with_linear:
                hidden = hidden + self.self_attn["linear_attn"](normed)
            else:  # by position: the cache's name differs between versions, and a wrong one is ignored
                hidden = hidden + self.self_attn(normed, rotary, mask, cache)[0]
        if not self.ffn.no_op:
            normed = self.post_attention_layernorm(hidden)
            hidden = hidden + (self.mlp["linear_mlp"](normed) if self.ffn.replace_with_linear else self.mlp(normed))
        return hidden


def _width(ffn: Any, hidden_size: int) -> int:
    """Channels of a gated FFN: as given, else DeciLM's rule round_up_256(int(2 * ffn_mult * hidden / 3))."""
    exact = getattr(ffn, "intermediate_size", None)
    return int(exact) if exact else -(-int(2 * ffn.ffn_mult * hidden_size / 3) // 256) * 256


def _mask(hidden: Tensor, seen: int, padding: Tensor | None) -> Tensor:
    """Added to scores, [batch or 1, 1, tokens, seen + tokens]: no later position, none where `padding` is 0.

    The lowest finite number, not -inf: a padded position attends to nothing, and its softmax must not be NaN.
    """
    tokens = hidden.shape[1]
    allowed = torch.ones(tokens, seen + tokens, dtype=torch.bool, device=hidden.device).tril(seen)[None, None]
    if padding is not None:
        allowed = allowed & padding[:, None, None, :].bool()
    return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)


class DeciLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks, final norm, and a head that is tied to the embedding or not."""

    config_class = NemotronNasConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: NemotronNasConfig) -> None:
        super().__init__(config)
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self._no_split_modules, self._skip_keys_device_placement = ["DeciLMBlock"], ["past_key_values"]
        pairs = [(block.attention, block.ffn) for block in config.block_configs]
        cached = [not attention.no_op and not attention.replace_with_linear for attention, _ in pairs]
        blocks = [DeciLMBlock(config, *pair, cache_index=sum(cached[:index])) for index, pair in enumerate(pairs)]
        rope: Any = config
        parts = {"embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size), "layers": nn.ModuleList(blocks)}
        parts |= {"norm": LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)}
        self.model = nn.ModuleDict(parts | {"rotary_emb": LlamaRotaryEmbedding(config=rope)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        PreTrainedModel.post_init(self)

    def get_input_embeddings(self) -> Any:
        """The embedding; transformers 4 ties the head to it through these two."""
        return self.model["embed_tokens"]

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.lm_head

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
        hidden = self.model["embed_tokens"](input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask, rotary = _mask(hidden, seen, attention_mask), self.model["rotary_emb"](hidden, position_ids)
        for block in self.model["layers"]:
            hidden = block(hidden, rotary, mask, past_key_values)
        logits = self.lm_head(self.model["norm"](hidden[:, -logits_to_keep:]))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
