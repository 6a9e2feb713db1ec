"""Weights of any replacement: from the parent, the replacement library, or initial weights.

A span has a whole block that was trained in its place. A span's replacement takes the subblock that stays from that
whole block, where a single block's replacement takes it from the parent.
"""

from dataclasses import dataclass, field

import torch

from storage.library import Library, channel_order_name, entry_name, whole_name
from storage.parent import Parent
from storage.records import Weights
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.model.assembly import compose, initial_weights
from tasks.puzzle.model.initialise import Tensors


@dataclass(frozen=True)
class ReplacementWeights:
    """Reads tensors of replacements to `device` in `dtype`; blocks that replacements share are read once and kept."""

    parent: Parent
    library: Library
    device: torch.device
    dtype: torch.dtype
    _blocks: dict[tuple[str, int, int], Tensors] = field(default_factory=dict)

    def tensors(self, replacement: Replacement, weights: Weights) -> Tensors:
        """Read the tensors of one child block, named as within a Llama layer; subblocks that stay share memory."""
        if weights == "decoupled":
            single = replacement.span == 1
            base = self._parent_block(replacement.first_block) if single else self._whole_block(replacement)
            return compose(self.parent.config, base, replacement, lambda variant: self._trained(replacement, variant))
        start = self.library.start_of(replacement.first_block, replacement.span)
        base = self._parent_block(start)

        def initial(variant: Attention | Ffn) -> Tensors:
            order = self.library.read(channel_order_name(start))["order"].to(self.device)
            return initial_weights(self.parent.config, base, order)(variant)

        return compose(self.parent.config, base, replacement, initial)

    def _parent_block(self, index: int) -> Tensors:
        key = ("parent", index, 1)
        if key not in self._blocks:
            self._blocks[key] = self.parent.block(index, self.device, self.dtype)
        return self._blocks[key]

    def _whole_block(self, replacement: Replacement) -> Tensors:
        key = ("whole", replacement.first_block, replacement.span)
        if key not in self._blocks:
            self._blocks[key] = self._read(whole_name(replacement.first_block, replacement.span))
        return self._blocks[key]

    def _trained(self, replacement: Replacement, variant: Attention | Ffn) -> Tensors:
        return self._read(entry_name(replacement.first_block, variant, replacement.span))

    def _read(self, name: str) -> Tensors:
        return {key: tensor.to(self.device, self.dtype) for key, tensor in self.library.read(name).items()}
