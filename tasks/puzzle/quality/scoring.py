"""Replace-1-block scores: KL(parent || child) with one block of the parent replaced (METHOD.md, Scoring).

In: candidates, which are replacements with their tensors, and the parent's cached hidden states. Out: per-token losses
of each candidate. A candidate starts at the cached boundary before its block, so that only the blocks behind it run.
The parent's logits come from the last boundary and are shared by all candidates. A group of candidates goes through the
depth together, so that each parent block is read once for the group, while the one before it computes. Candidates never
share a GEMM, so the grouping does not change a candidate's bytes. Removals of whole blocks behind other removals go
through the model together, too.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from storage.model_config import ModelConfig
from storage.variants import Replacement
from tasks.puzzle.model.ahead import Ahead
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.head import Head, TokenLosses, compare_with_parent
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn


@dataclass(frozen=True)
class Candidate:
    """A replacement to score, with its tensors, named as within a Llama layer."""

    replacement: Replacement
    tensors: Mapping[str, Tensor]


def score_group(
    config: ModelConfig,
    parent_block: Callable[[int], Mapping[str, Tensor]],
    boundary: Callable[[int], Tensor],
    head: Head,
    tokens: Tensor,
    candidates: Sequence[Candidate],
) -> list[TokenLosses]:
    """Score candidates on a batch of sequences.

    Args:
        config: geometry of the parent.
        parent_block: reads the tensors of a parent block; it is called once for each block behind the first replaced.
        boundary: reads the parent's hidden states at a boundary, [sequences, tokens, hidden].
        head: the parent's final norm and LM head.
        tokens: [sequences, tokens] int64.
        candidates: the replacements to score, in any order.

    Returns:
        Per-token losses of each candidate, in the given order.
    """
    streams: dict[int, Tensor] = {}
    with torch.inference_mode():
        last = boundary(config.num_blocks)
        rotary = rotary_for(config, last.shape[1], last)
        first_behind = min(candidate.replacement.parent_blocks.stop for candidate in candidates)
        blocks = Ahead(map(parent_block, range(first_behind, config.num_blocks)), last.device)
        for index in range(min(candidate.replacement.first_block for candidate in candidates), config.num_blocks):
            behind = [number for number in streams if candidates[number].replacement.parent_blocks[-1] < index]
            starting = [
                number for number, candidate in enumerate(candidates) if candidate.replacement.first_block == index
            ]
            if behind:
                block = Block.load(config, parent_attention(config), parent_ffn(config), next(blocks))
                for number in behind:
                    streams[number] = block(streams[number], rotary)
            hidden = boundary(index) if starting else None
            for number in starting:
                replacement, tensors = candidates[number].replacement, candidates[number].tensors
                block = Block.load(config, replacement.attention, replacement.ffn, tensors)
                streams[number] = block(hidden, rotary)
        return compare_with_parent(head, tokens, last, [streams[number] for number in range(len(candidates))])


def score_removals(
    config: ModelConfig,
    parent_block: Callable[[int], Mapping[str, Tensor]],
    embedded: Tensor,
    last: Tensor,
    head: Head,
    tokens: Tensor,
    removed: Collection[int],
    candidates: Sequence[int],
) -> list[TokenLosses]:
    """Compare the parent with what remains of it without the removed blocks and one candidate.

    Args:
        config: geometry of the parent.
        parent_block: reads the tensors of a parent block; it is called once for each block that remains.
        embedded: hidden states before the first block, [sequences, tokens, hidden].
        last: the parent's hidden states behind the last block, in the same shape.
        head: the parent's final norm and LM head.
        tokens: [sequences, tokens] int64.
        removed: indices of the blocks that are gone already.
        candidates: indices of the blocks that are tried.

    Returns:
        Per-token losses without each candidate, in the given order.
    """
    streams: dict[int, Tensor] = {}
    with torch.inference_mode():
        rotary, remaining = rotary_for(config, embedded.shape[1], embedded), embedded
        kept = [index for index in range(config.num_blocks) if index not in removed]
        for index, tensors in zip(kept, Ahead(map(parent_block, kept), embedded.device), strict=True):
            block = Block.load(config, parent_attention(config), parent_ffn(config), tensors)
            streams = {candidate: block(stream, rotary) for candidate, stream in streams.items()}
            if index in candidates:
                streams[index] = remaining
            if len(streams) < len(candidates):
                remaining = block(remaining, rotary)
        return compare_with_parent(head, tokens, last, [streams[candidate] for candidate in candidates])
