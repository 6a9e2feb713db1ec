"""Log-loss by position in a document: does a child still use a long context as its parent does?

In: a model's losses at every position of some documents (without long documents of params: of the corpus's validation
sequences, which may begin within a document). Out: sums in ranges of positions that double from 64 on, and
means of parent and children with errors clustered by document.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from storage.accuracy import ChildLoss, PositionBucket
from tasks.puzzle.model.head import compare_models
from tasks.puzzle.quality.accuracy import PARENT
from tasks.puzzle.standard_error import standard_error

_FIRST_END = 64

Losses = Sequence[Sequence[float]]
"""For each document a sum of losses for each range that it reaches, nats."""


def ranges(tokens: int) -> list[tuple[int, int]]:
    """Return ranges (first, end) of positions of documents up to `tokens` long; nothing predicts the token at 0."""
    parts, first, end = [], 1, _FIRST_END
    while first < tokens:
        parts.append((first, min(end, tokens)))
        first, end = end, 2 * end
    return parts


def summed_losses(model: PreTrainedModel, ids: Tensor, parts: Sequence[tuple[int, int]]) -> list[float]:
    """Sum a model's losses on one document, ids [1, tokens] int64, over the ranges that it reaches."""
    loaded: Any = model
    projected = (loaded.model(input_ids=ids, use_cache=False).last_hidden_state, loaded.lm_head.weight)
    losses = compare_models(ids, projected, [projected])[0].lm_loss[0].double()
    return [float(losses[first - 1 : end - 1].sum()) for first, end in parts if first < ids.shape[1]]


def compare_positions(
    models: Mapping[str, Losses], lengths: Sequence[int], documents: Sequence[int]
) -> tuple[PositionBucket, ...]:
    """Compare children with the parent in each range of positions.

    Args:
        models: sums of losses by the model's name, PARENT among them.
        lengths: tokens of each document.
        documents: numbers by which errors are clustered.
    """
    buckets = []
    for index, (first, end) in enumerate(ranges(max(lengths))):
        tokens = [min(length, end) - first for length in lengths]
        reached = [document for document, count in enumerate(tokens) if count > 0]
        counts = [tokens[document] for document in reached]
        means = {
            name: [losses[document][index] / count for document, count in zip(reached, counts, strict=True)]
            for name, losses in models.items()
        }
        clusters = [documents[document] for document in reached]
        buckets.append(
            PositionBucket(
                first=first,
                end=end,
                tokens=sum(counts),
                documents=len(set(clusters)),
                parent=_mean(means[PARENT], counts),
                children={
                    name: _child_loss(means[PARENT], losses, counts, clusters)
                    for name, losses in means.items()
                    if name != PARENT
                },
            )
        )
    return tuple(buckets)


def _mean(values: Sequence[float], counts: Sequence[int]) -> float:
    return math.fsum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


def _child_loss(
    parent: Sequence[float], child: Sequence[float], counts: Sequence[int], clusters: Sequence[int]
) -> ChildLoss:
    differences = [mine - theirs for mine, theirs in zip(child, parent, strict=True)]
    stderr = standard_error(differences, clusters, [float(count) for count in counts])
    return ChildLoss(_mean(child, counts), _mean(differences, counts), stderr)
