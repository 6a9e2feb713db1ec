"""The live teachers of ranks: the parent in shards, or streamed from disk block by block where it does not fit.

In: token ids. Out: the parent's hidden states at the boundaries that the loss compares. A streamed teacher takes all
batches of a step through one block after the other, so that each block is read once a step; the states wait on the CPU:
sequences of a step / ranks x boundaries x seq_len x hidden elements.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from storage.parent import Parent
from tasks.gkd.material import Material
from tasks.puzzle.distill.gkd import States
from tasks.puzzle.distill.sharded import ShardedTeacher, Sharding, embedded
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import Compute
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn


class _Tokens:
    """Token ids of train sequences, and the embedding that looks them up."""

    def __init__(self, material: Material, parent: Parent, compute: Compute) -> None:
        assert material.tokens is not None
        self._tokens, self._first = material.tokens, material.first
        self._embedding, _, _ = parent.outside(*compute)

    def embedded(self, sequences: Sequence[int]) -> Tensor:
        """Look up boundary 0 of some sequences."""
        return embedded(self._embedding, self._tokens[[sequence - self._first for sequence in sequences]])


class ShardedStates:
    """The parent's hidden states of train sequences, from a teacher in shards; ranks ask at the same time."""

    def __init__(self, material: Material, parent: Parent, sharding: Sharding) -> None:
        cpu = torch.device("cpu")
        self._tokens, self._boundaries = _Tokens(material, parent, sharding.compute), material.boundaries
        self._teacher = ShardedTeacher.load(
            parent.config, sharding, lambda index: parent.block(index, cpu, sharding.compute.dtype)
        )

    def prepare(self, _: Sequence[Sequence[int]]) -> None:
        """Do nothing before a step: batches are computed when they are asked for."""

    def of(self, sequences: Sequence[int]) -> States:
        """Compute the boundaries of some sequences that the loss compares."""
        with torch.no_grad():
            states: dict[int, Tensor] = self._teacher(self._tokens.embedded(sequences), self._boundaries)
        return states.__getitem__


class StreamedStates:
    """The parent's hidden states of a step's batches, computed before it with one block in memory at a time."""

    def __init__(self, material: Material, parent: Parent, compute: Compute) -> None:
        self._tokens, self._boundaries = _Tokens(material, parent, compute), {*material.boundaries}
        self._parent, self._compute = parent, compute
        self._states: dict[tuple[int, ...], dict[int, Tensor]] = {}

    def prepare(self, batches: Sequence[Sequence[int]]) -> None:
        """Take a step's batches through the parent."""
        config, keys = self._parent.config, list(dict.fromkeys(tuple(batch) for batch in batches))
        variants = parent_attention(config), parent_ffn(config)
        hidden = [self._tokens.embedded(key) for key in keys]
        rotary = rotary_for(config, hidden[0].shape[1], hidden[0])
        self._states = {key: {0: states.cpu()} for key, states in zip(keys, hidden, strict=True)}
        for boundary in range(1, config.num_blocks + 1):
            block = Block.load(config, *variants, self._parent.block(boundary - 1, *self._compute))
            for position, key in enumerate(keys):
                with torch.no_grad():
                    hidden[position] = block(hidden[position], rotary)
                if boundary in self._boundaries:
                    self._states[key][boundary] = hidden[position].cpu()

    def of(self, sequences: Sequence[int]) -> States:
        """Return a function from a boundary to the states of a batch that was prepared."""
        states = self._states[tuple(sequences)]
        return lambda boundary: states[boundary].to(self._compute.device)
