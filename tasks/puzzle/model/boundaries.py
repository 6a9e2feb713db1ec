"""Hidden states at every block boundary of a model.

In: the embedding, the blocks' tensors in order, token ids. Out: boundary 0 (the embedded tokens), then the hidden
states behind each block. The blocks are read one by one, so that memory holds one block and one shard of sequences,
whatever the depth.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from storage.model_config import ModelConfig
from storage.variants import Attention, Ffn
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.rotary import rotary_for

BlockWeights = tuple[Attention, Ffn, Mapping[str, Tensor]]
"""A block's attention variant, FFN variant and tensors (names as within a Llama layer)."""


def embed(embedding: Tensor, tokens: Tensor) -> Tensor:
    """Look up boundary 0 in the embedding.

    Args:
        embedding: [vocabulary, hidden].
        tokens: [sequences, tokens] int64, on any device.

    Returns:
        [sequences, tokens, hidden], in the dtype and on the device of the embedding.
    """
    with torch.inference_mode():
        return functional.embedding(tokens.to(embedding.device), embedding)


def advance(config: ModelConfig, block: BlockWeights, hidden: Tensor, sequences_per_batch: int) -> Tensor:
    """Compute the boundary behind `block` from the boundary before it.

    Args:
        config: geometry of the model.
        block: the block's variants, and its tensors.
        hidden: the boundary before it, [sequences, tokens, hidden].
        sequences_per_batch: sequences in one forward pass.

    Returns:
        A new tensor, [sequences, tokens, hidden].
    """
    attention, ffn, tensors = block
    with torch.inference_mode():
        rotary = rotary_for(config, hidden.shape[1], hidden)
        layer = Block.load(config, attention, ffn, tensors)
        return torch.cat([layer(part, rotary) for part in torch.split(hidden, sequences_per_batch)])


def boundaries(
    config: ModelConfig, embedding: Tensor, blocks: Iterable[BlockWeights], tokens: Tensor, sequences_per_batch: int
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
