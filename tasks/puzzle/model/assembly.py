"""Composes the tensors of a child's block from the parent's tensors and those of its variants."""

from collections.abc import Callable, Mapping

from torch import Tensor

from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.model.initialise import Tensors, attention_part, ffn_part, initial_attention, initial_ffn
from tasks.puzzle.search_space import parent_attention, parent_ffn

Subblock = Callable[[Attention | Ffn], Tensors]
"""Returns the tensors of a variant that is not the parent's: from the library, or initial weights."""


def compose(config: ModelConfig, parent: Mapping[str, Tensor], replacement: Replacement, subblock: Subblock) -> Tensors:
    """Compose the tensors of one child block, named as within a Llama layer.

    Args:
        config: geometry of the parent.
        parent: tensors of the parent's block; the subblocks that stay the parent's are taken from it.
        replacement: the variants that the block consists of.
        subblock: returns the tensors of a variant that is neither the parent's nor a no-op.
    """
    parts: Tensors = {}
    if replacement.attention == parent_attention(config):
        parts |= attention_part(parent)
    elif replacement.attention.kind != "no_op":
        parts |= subblock(replacement.attention)
    if replacement.ffn == parent_ffn(config):
        parts |= ffn_part(parent)
    elif replacement.ffn.kind != "no_op":
        parts |= subblock(replacement.ffn)
    return parts


def initial_weights(config: ModelConfig, parent: Mapping[str, Tensor], order: Tensor) -> Subblock:
    """Return a source of initial weights for :func:`compose`.

    Args:
        config: geometry of the parent.
        parent: tensors of the parent's block.
        order: the block's FFN channels from the most to the least important, [intermediate] int64.
    """

    def subblock(variant: Attention | Ffn) -> Tensors:
        if isinstance(variant, Attention):
            return initial_attention(config, parent, variant)
        return initial_ffn(parent, variant, order)

    return subblock
