"""A child's blocks put together from the parent's tensors and the replacement library."""

from collections.abc import Callable, Mapping

from torch import Tensor

from storage.model_config import ModelConfig
from storage.records import Attention, Ffn, Replacement
from tasks.puzzle.initialise import Tensors, attention_part, ffn_part, initial_attention, initial_ffn
from tasks.puzzle.variants import parent_attention, parent_ffn

Subblock = Callable[[Attention | Ffn], Tensors]
"""Where the tensors of a variant that is not the parent's come from: the library, or initial weights."""


def compose(config: ModelConfig, parent: Mapping[str, Tensor], replacement: Replacement, subblock: Subblock) -> Tensors:
    """Tensors of one child block, named as within a Llama layer.

    Args:
        config: geometry of the parent.
        parent: tensors of the parent's block, from which the halves that stay the parent's are taken.
        replacement: what the block becomes.
        subblock: gives the tensors of a variant that is neither the parent's nor a no-op.
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
    """Initial weights as a source for :func:`compose`; `order` ranks the FFN channels of this block."""

    def subblock(variant: Attention | Ffn) -> Tensors:
        if isinstance(variant, Attention):
            return initial_attention(config, parent, variant)
        return initial_ffn(parent, variant, order)

    return subblock
