"""Hidden states at every block boundary, block by block: memory holds one block and one shard of sequences."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from storage.model_config import ModelConfig
from storage.records import Attention, Ffn
from tasks.puzzle.blocks import Block
from tasks.puzzle.rotary import rotary_for


def boundaries(
    config: ModelConfig,
    embedding: Tensor,
    blocks: Iterable[tuple[Attention, Ffn, Mapping[str, Tensor]]],
    tokens: Tensor,
    sequences_per_batch: int,
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
    with torch.inference_mode():
        hidden = functional.embedding(tokens.to(embedding.device), embedding)
        rotary = rotary_for(config, tokens.shape[1], hidden)
    yield hidden
    for attention, ffn, tensors in blocks:
        with torch.inference_mode():
            block = Block.load(config, attention, ffn, tensors)
            hidden = torch.cat([block(part, rotary) for part in torch.split(hidden, sequences_per_batch)])
        yield hidden
