"""Costs of components in an engine that runs whole models only: times of random architectures, by least squares.

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

from storage.variants import Attention, Ffn

Blocks = Sequence[tuple[Attention, Ffn]]


@dataclass(frozen=True)
class Costs:
    """The components' times that whole models gave.

    Attributes:
        attention: milliseconds of an attention without kv heads.
        kv_head: milliseconds of each kv head of an attention.
        linear: milliseconds of a linear attention.
        ffn: milliseconds of an FFN of no width.
        channel: milliseconds of each channel of an FFN.
        rest: milliseconds of all else in a model.
    """

    attention: float
    kv_head: float
    linear: float
    ffn: float
    channel: float
    rest: float

    def attention_ms(self, attention: Attention) -> float:
        """Milliseconds of an attention variant."""
        gqa = self.attention + attention.num_kv_heads * self.kv_head
        return {"gqa": gqa, "linear": self.linear, "no_op": 0.0}[attention.kind]

    def ffn_ms(self, width: int) -> float:
        """Milliseconds of an FFN with `width` channels."""
        return self.ffn + width * self.channel

    def total_ms(self, blocks: Blocks, no_ffn: int) -> float:
        """Milliseconds of a whole model; a removed FFN costs as much as the file's stand-in of `no_ffn` channels."""
        return self.rest + sum(
            self.attention_ms(attention) + self.ffn_ms(ffn.intermediate_size or no_ffn)
            for attention, ffn in _kept(blocks)
        )


def designs(
    attentions: Sequence[Attention], ffns: Sequence[Ffn], num_blocks: int, count: int, seed: int
) -> list[list[tuple[Attention, Ffn]]]:
    """`count` architectures of a quarter to four fifths of `num_blocks` blocks, whose variants are drawn at random.

    The first block has the first attention, so that every design has one.
    """
    draw = random.Random(seed)
    drawn = []
    for _ in range(count):
        depth = draw.randint(max(1, num_blocks // 4), max(1, num_blocks * 4 // 5))
        blocks = [(draw.choice(attentions), draw.choice(ffns)) for _ in range(depth)]
        drawn.append([(attentions[0], blocks[0][1]), *blocks[1:]])
    return drawn


def solve(models: Sequence[Blocks], milliseconds: Sequence[float], no_ffn: int) -> Costs:
    """Non-negative costs with the least sum of squared relative errors over the models."""
    from scipy.optimize import nnls  # imported late: it comes with the extra `llamacpp`

    rows = []
    for blocks in models:
        kinds = Counter(attention.kind for attention, _ in _kept(blocks))
        heads = sum(attention.num_kv_heads for attention, _ in blocks)
        channels = sum(ffn.intermediate_size or no_ffn for _, ffn in _kept(blocks))
        rows.append([kinds["gqa"], heads, kinds["linear"], kinds.total(), channels, 1])
    weighted = np.array(rows, float) / np.array(milliseconds, float)[:, None]
    costs, _ = nnls(weighted, np.ones(len(rows)))
    return Costs(*map(float, costs))


def _kept(blocks: Blocks) -> Blocks:
    """Blocks of the file: a block that lacks attention and FFN is left out."""
    return [block for block in blocks if block != (Attention("no_op"), Ffn("no_op"))]
