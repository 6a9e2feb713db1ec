"""What each component costs in an engine that runs whole models only: random architectures, divided by least squares.

In: the variants, times of whole models. Out: milliseconds of every variant and of what each model has besides its
blocks. Tried against the difference of stacks with N and 2N copies in llama.cpp, this predicts the decode time of
children that were in neither more closely, and prefill as closely (docs/costs.md). Attention is a line in the kv heads
and an FFN one in its channels, so that noise makes no variant cheaper than a smaller one.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.records import Attention, Ffn

Blocks = Sequence[tuple[Attention, Ffn]]


@dataclass(frozen=True)
class Costs:
    """Milliseconds: of an attention with no kv head and of each of them, of a linear one; of an FFN of no width and of
    each of its channels; of all else.
    """

    attention: float
    kv_head: float
    linear: float
    ffn: float
    channel: float
    rest: float

    def of_attention(self, attention: Attention) -> float:
        """An attention variant."""
        gqa = self.attention + attention.num_kv_heads * self.kv_head
        return {"gqa": gqa, "linear": self.linear, "no_op": 0.0}[attention.kind]

    def of_ffn(self, width: int) -> float:
        """An FFN with so many channels."""
        return self.ffn + width * self.channel

    def total(self, blocks: Blocks, no_ffn: int) -> float:
        """A whole model; a removed FFN costs what one of `no_ffn` channels costs, the stand-in that the file has."""
        return self.rest + sum(
            self.of_attention(attention) + self.of_ffn(ffn.intermediate_size or no_ffn)
            for attention, ffn in _kept(blocks)
        )


def designs(
    attentions: Sequence[Attention], ffns: Sequence[Ffn], num_blocks: int, count: int, seed: int
) -> list[list[tuple[Attention, Ffn]]]:
    """`count` architectures of a quarter to four fifths of `num_blocks` blocks, each drawn from the variants.

    The first block has the first attention, so that every design has one.
    """
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        depth = draw.randint(max(1, num_blocks // 4), max(1, num_blocks * 4 // 5))
        blocks = [(draw.choice(attentions), draw.choice(ffns)) for _ in range(depth)]
        found.append([(attentions[0], blocks[0][1]), *blocks[1:]])
    return found


def solve(models: Sequence[Blocks], milliseconds: Sequence[float], no_ffn: int) -> Costs:
    """Costs, none below 0, with the least sum of squared relative errors over the models."""
    from scipy.optimize import nnls  # here: it comes with the extra `llamacpp`

    rows = []
    for blocks in models:
        kinds = Counter(attention.kind for attention, _ in _kept(blocks))
        heads = sum(attention.num_kv_heads for attention, _ in blocks)
        channels = sum(ffn.intermediate_size or no_ffn for _, ffn in _kept(blocks))
        rows.append([kinds["gqa"], heads, kinds["linear"], kinds.total(), channels, 1])
    weighted = np.array(rows, float) / np.array(milliseconds, float)[:, None]
    found, _ = nnls(weighted, np.ones(len(rows)))
    return Costs(*map(float, found))


def _kept(blocks: Blocks) -> Blocks:
    """A block that lacks both halves is left out of the file."""
    return [block for block in blocks if block != (Attention("no_op"), Ffn("no_op"))]
