"""One decoder block of any variant, as a torch module with the tensor names of a Llama checkpoint.

Shapes: hidden [batch, tokens, hidden]; query [batch, heads, tokens, head_dim]; rotary as in tasks.puzzle.model.rotary.
A removed subblock (no-op) has no tensors, its norm included.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn
from tasks.puzzle.model.rotary import Rotary, rotate

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}
"""Activation functions by their names in config.json (storage.model_config.ACTIVATIONS)."""


class KeyValues(Protocol):
    """A KV cache: takes a layer's new keys and values and returns all that it holds, as transformers' caches do."""

    def update(self, key: Tensor, value: Tensor, layer: int, /) -> tuple[Tensor, Tensor]:
        """Add keys and values of a layer; all of them are [batch, kv heads, tokens, head_dim]."""
        ...


class RMSNorm(nn.Module):
    """Root-mean-square norm with statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension of `hidden`."""
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(hidden.dtype)


class GroupedQueryAttention(nn.Module):
    """Causal attention of `num_heads` query heads that share `num_kv_heads` key and value heads.

    `cache_index` is the layer's number in the KV cache: its position among the blocks that have attention, so that a
    block without attention leaves no hole. With qk-norm (Qwen3) an RMSNorm over each head of queries and keys comes
    before the rotary positions, its weight [head_dim] the same for all heads.
    """

    def __init__(self, config: ModelConfig, num_kv_heads: int, cache_index: int = 0) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.cache_index = cache_index
        self.q_proj = nn.Linear(hidden, config.num_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, num_kv_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, num_kv_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * head_dim, hidden, bias=config.output_bias)
        self.q_norm: RMSNorm | nn.Identity = nn.Identity()
        self.k_norm: RMSNorm | nn.Identity = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def heads(
        self, hidden: Tensor, rotary: Rotary, mask: Tensor | None = None, cache: KeyValues | None = None
    ) -> Tensor:
        """Compute the input of o_proj, [batch, tokens, heads * head_dim]."""
        split = (*hidden.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden).view(split)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).view(split)).transpose(1, 2)
        value = self.v_proj(hidden).view(split).transpose(1, 2)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.cache_index)
        return _attend(query, key, value, mask).transpose(1, 2).flatten(2)

    def forward(
        self, hidden: Tensor, rotary: Rotary, mask: Tensor | None = None, cache: KeyValues | None = None
    ) -> Tensor:
        """Attend within each sequence; `mask` is additive or boolean, [batch, 1, tokens, keys]; None means causal."""
        joined: Tensor = self.o_proj(self.heads(hidden, rotary, mask, cache))
        return joined


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute scaled dot-product attention, [batch, heads, tokens, head_dim].

    In decoding (a single query token) the heads of a group are the rows of one query, so that keys and values are not
    copied: measured 5 to 13 times as fast as `enable_gqa` on a CPU (batch 8, context 192, 9 heads).
    """
    batch, heads, tokens, head_dim = query.shape
    if tokens == 1:
        grouped = query.view(batch, key.shape[1], -1, head_dim)
        return functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask).view(query.shape)
    shared = key.shape[1] != heads
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=shared
    )


class LinearAttention(nn.Module):
    """One linear layer in place of attention: each token sees itself alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, rotary: Rotary, mask: Tensor | None = None, cache: KeyValues | None = None
    ) -> Tensor:
        """Map each token; positions, mask and cache are not used."""
        mapped: Tensor = self.linear_attn(hidden)
        return mapped


class GatedFfn(nn.Module):
    """The FFN down(activation(gate(x)) * up(x)) with `intermediate_size` channels."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = _ACTIVATIONS[config.activation]

    def channels(self, hidden: Tensor) -> Tensor:
        """Compute the input of down_proj, [batch, tokens, intermediate]; importance is measured on it."""
        gated: Tensor = self.activation(self.gate_proj(hidden)) * self.up_proj(hidden)
        return gated

    def forward(self, hidden: Tensor) -> Tensor:
        """Map each token."""
        mapped: Tensor = self.down_proj(self.channels(hidden))
        return mapped


class LinearFfn(nn.Module):
    """One linear layer in place of the FFN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map each token."""
        mapped: Tensor = self.linear_mlp(hidden)
        return mapped


class Block(nn.Module):
    """A decoder block: hidden + attention(norm(hidden)), then + ffn(norm(.)); either may be absent (no-op)."""

    self_attn: GroupedQueryAttention | LinearAttention
    mlp: GatedFfn | LinearFfn

    def __init__(self, config: ModelConfig, attention: Attention, ffn: Ffn, cache_index: int = 0) -> None:
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps)
        if attention.kind != "no_op":
            self.input_layernorm = RMSNorm(*norm)
            self.self_attn = (
                GroupedQueryAttention(config, attention.num_kv_heads, cache_index)
                if attention.kind == "gqa"
                else LinearAttention(config)
            )
        if ffn.kind != "no_op":
            self.post_attention_layernorm = RMSNorm(*norm)
            self.mlp = GatedFfn(config, ffn.intermediate_size) if ffn.kind == "gated" else LinearFfn(config)
        self.attention = attention
        self.ffn = ffn

    @classmethod
    def load(cls, config: ModelConfig, attention: Attention, ffn: Ffn, tensors: Mapping[str, Tensor]) -> Self:
        """Build a frozen block over `tensors` (names as in a Llama layer); it shares their memory.

        Raises:
            RuntimeError: a tensor is missing, left over, or has another shape than the variant.
        """
        with torch.device("meta"):
            block = cls(config, attention, ffn)
        block.load_state_dict(dict(tensors), strict=True, assign=True)
        return block.requires_grad_(False)

    def attend(
        self, hidden: Tensor, rotary: Rotary, mask: Tensor | None = None, cache: KeyValues | None = None
    ) -> Tensor:
        """Return the hidden states behind the attention subblock, [batch, tokens, hidden]."""
        if self.attention.kind == "no_op":
            return hidden
        attended: Tensor = self.self_attn(self.input_layernorm(hidden), rotary, mask, cache)
        return hidden + attended

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states behind the FFN subblock, [batch, tokens, hidden]."""
        if self.ffn.kind == "no_op":
            return hidden
        fed: Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + fed

    def forward(
        self, hidden: Tensor, rotary: Rotary, mask: Tensor | None = None, cache: KeyValues | None = None
    ) -> Tensor:
        """Return the hidden states behind both subblocks, [batch, tokens, hidden]."""
        return self.feed_forward(self.attend(hidden, rotary, mask, cache))
