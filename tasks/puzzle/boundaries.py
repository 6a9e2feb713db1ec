"""Hidden states at every block boundary, block by block: memory holds one block and one shard of sequences."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from storage.model_config import ModelConfig
from storage.records import Attention, Ffn
from tasks.puzzle.blocks import Block
from tasks.puzzle.rotary import rotary_for

Kind = tuple[Attention, Ffn, Mapping[str, Tensor]]
"""Attention variant, FFN variant and tensors of a block."""


def embed(embedding: Tensor, tokens: Tensor) -> Tensor:
    """Boundary 0 of tokens [sequences, tokens] int64: rows of the embedding [vocabulary, hidden]."""
    with torch.inference_mode():
        return functional.embedding(tokens.to(embedding.device), embedding)


def advance(config: ModelConfig, block: Kind, hidden: Tensor, sequences_per_batch: int) -> Tensor:
    """The boundary behind `block` from the one before it, `hidden` [sequences, tokens, hidden]; a new tensor."""
    attention, ffn, tensors = block
    with torch.inference_mode():
        rotary = rotary_for(config, hidden.shape[1], hidden)
        of = Block.load(config, attention, ffn, tensors)
        return torch.cat([of(part, rotary) for part in torch.split(hidden, sequences_per_batch)])


def boundaries(
    config: ModelConfig, embedding: Tensor, blocks: Iterable[Kind], tokens: Tensor, sequences_per_batch: int
) -> Iterator[Tensor]:
    """Yield the hidden states before each block, then before the final norm.

    Args:
        config: geometry of the model.
        embedding: [vocabulary, hidden], in the dtype and on the device of compute.
        blocks: attention variant, FFN variant and tensors of each block, read lazily in order.
        tokens: [sequences, tokens] int64.
        sequences_per_batch: sequences in one forward pass.

    Yields:
        num_blocks + 1 tensors [sequences, tokens, hidden]; each is new, so a consumer may keep or drop it.
    """
    hidden = embed(embedding, tokens)
    yield hidden
    for block in blocks:
        hidden = advance(config, block, hidden, sequences_per_batch)
        yield hidden
