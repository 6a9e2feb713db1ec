"""The variants of a parent's block.

In: the parent's geometry and the FFN ratios of params.yaml. Out: variants in a fixed order (the parent's own first).
The space is Puzzle's (arXiv 2411.19146, section 2); tasks/puzzle/costs/sizes.py says how large each variant is.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn, Replacement


class SpaceSettings(Protocol):
    """The settings that decide the variants: FFN ratios, the multiple that widths are rounded to, linear layers."""

    @property
    def ffn_ratios(self) -> Sequence[float]:
        """Return widths relative to the parent's."""

    @property
    def width_multiple(self) -> int:
        """Return the multiple that widths are rounded to."""

    @property
    def linear(self) -> bool:
        """Tell whether one linear layer is among the variants."""


def parent_attention(config: ModelConfig) -> Attention:
    """Return the attention variant that the parent's blocks have."""
    return Attention("gqa", config.num_kv_heads)


def parent_ffn(config: ModelConfig) -> Ffn:
    """Return the FFN variant that the parent's blocks have."""
    return Ffn("gated", config.intermediate_size)


def parent_blocks(config: ModelConfig) -> tuple[Replacement, ...]:
    """Return the parent itself as a sequence of replacements."""
    attention, ffn = parent_attention(config), parent_ffn(config)
    return tuple(Replacement(index, 1, attention, ffn) for index in range(config.num_blocks))


def block_variants(
    config: ModelConfig, settings: SpaceSettings, *, linear: bool = False
) -> tuple[tuple[Attention, ...], tuple[Ffn, ...]]:
    """List attention and FFN variants of a block, the parent's own first.

    Args:
        config: the parent.
        settings: the space.
        linear: whether linear layers are among them, whatever the settings say.
    """
    linear = linear or settings.linear
    ffns = ffn_variants(config, settings.ffn_ratios, settings.width_multiple, linear)
    return attention_variants(config, linear), ffns


def attention_variants(config: ModelConfig, linear: bool) -> tuple[Attention, ...]:
    """List attention variants of a block: the parent's kv heads, their proper divisors (descending), linear, no-op.

    Args:
        config: the parent.
        linear: whether one linear layer is among them.
    """
    heads = config.num_kv_heads
    divisors = [Attention("gqa", count) for count in range(heads, 0, -1) if heads % count == 0]
    return (*divisors, *([Attention("linear")] if linear else []), Attention("no_op"))


def ffn_variants(config: ModelConfig, ratios: Sequence[float], width_multiple: int, linear: bool) -> tuple[Ffn, ...]:
    """List FFN variants of a block: the parent's width, narrower ones (descending), linear, no-op.

    Args:
        config: the parent.
        ratios: widths relative to the parent's.
        width_multiple: widths are rounded to the nearest multiple (halves up), at least one multiple. Equal ones are
            one variant; one that reaches the parent's width is left out.
        linear: whether one linear layer is among them.
    """
    parent = config.intermediate_size
    multiples = (max(1, math.floor(ratio * parent / width_multiple + 0.5)) for ratio in ratios)
    widths = {multiple * width_multiple for multiple in multiples}
    narrower = sorted((width for width in widths if width < parent), reverse=True)
    gated = [Ffn("gated", width) for width in (parent, *narrower)]
    return (*gated, *([Ffn("linear")] if linear else []), Ffn("no_op"))
