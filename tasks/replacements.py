"""Tensors of any replacement: from the parent, the replacement library, or initial weights.

A span has one *whole* block that was trained in its place: the subblock that a single block's replacement takes from
the parent, a span's takes from there.
"""

from dataclasses import dataclass, field

import torch

from storage.library import Library, channel_order_name, entry_name, whole_name
from storage.parent import Parent
from storage.records import Attention, Ffn, Replacement, Weights
from tasks.puzzle.assembly import compose, initial_weights
from tasks.puzzle.initialise import Tensors


@dataclass(frozen=True)
class Replacements:
    """Reads tensors to `device` in `dtype`; blocks that replacements share are read once and kept."""

    parent: Parent
    library: Library
    device: torch.device
    dtype: torch.dtype
    _blocks: dict[tuple[str, int, int], Tensors] = field(default_factory=dict)

    def tensors(self, of: Replacement, weights: Weights) -> Tensors:
        """Tensors of one child block, named as within a Llama layer; subblocks that stay share memory."""
        if weights == "decoupled":
            base = self._whole(of) if of.span > 1 else self._parents(of.first_block)
            return compose(self.parent.config, base, of, lambda variant: self._trained(of, variant))
        start = self.library.start_of(of.first_block, of.span)
        base = self._parents(start)

        def initial(variant: Attention | Ffn) -> Tensors:
            order = self.library.read(channel_order_name(start))["order"].to(self.device)
            return initial_weights(self.parent.config, base, order)(variant)

        return compose(self.parent.config, base, of, initial)

    def _parents(self, index: int) -> Tensors:
        key = ("parent", index, 1)
        if key not in self._blocks:
            self._blocks[key] = self.parent.block(index, self.device, self.dtype)
        return self._blocks[key]

    def _whole(self, of: Replacement) -> Tensors:
        key = ("whole", of.first_block, of.span)
        if key not in self._blocks:
            self._blocks[key] = self._read(whole_name(of.first_block, of.span))
        return self._blocks[key]

    def _trained(self, of: Replacement, variant: Attention | Ffn) -> Tensors:
        return self._read(entry_name(of.first_block, variant, of.span))

    def _read(self, name: str) -> Tensors:
        return {key: tensor.to(self.device, self.dtype) for key, tensor in self.library.read(name).items()}
