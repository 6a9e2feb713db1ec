"""Rotary position embedding for every rope scaling that a parent may have.

In: a parent's geometry and positions. Out: cos and sin of the angles, and queries and keys rotated by them. The
frequencies of scaled ropes come from transformers, which is imported for them alone: a stage starts sooner without it.
"""

from typing import Any

import torch
from torch import Tensor

from storage.model_config import ModelConfig

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each [batch or 1, tokens, head_dim]."""


class RotaryEmbedding:
    """Computes cos and sin of positions (RoFormer, section 3.2.2).

    The first half of a head holds the first coordinate of every rotated pair, the second half the second.
    """

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("cpu"):  # models are built on the meta device, and this is no parameter to load
            self._frequencies, self._scale = _frequencies(config)

    def __call__(self, like: Tensor, positions: Tensor) -> Rotary:
        """Return cos and sin of positions [batch or 1, tokens]: computed in float32, then cast to `like`."""
        angles = positions[..., None].float() * self._frequencies.to(like.device)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._scale).to(like.dtype), (angles.sin() * self._scale).to(like.dtype)


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return the radians per position of each pair, [head_dim / 2], and the factor on cos and sin."""
    kind = config.rope["rope_type"]
    if kind == "default":
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / config.rope["rope_theta"] ** pairs, 1.0
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    geometry: dict[str, Any] = {
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context,
        "rope_parameters": dict(config.rope),
    }
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](PreTrainedConfig(**geometry))
    return frequencies, float(scale)


def rotary_for(config: ModelConfig, tokens: int, like: Tensor) -> Rotary:
    """Return cos and sin, each [1, tokens, head_dim], of positions 0 .. tokens-1, in the dtype and device of `like`."""
    return RotaryEmbedding(config)(like, torch.arange(tokens, device=like.device)[None])


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotate queries or keys, [batch, heads, tokens, head_dim], by their positions."""
    cos, sin = (part.unsqueeze(1) for part in rotary)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
