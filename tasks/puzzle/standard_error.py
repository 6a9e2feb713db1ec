"""The standard error of a mean over sequences of which some come from one document. No torch.

In: a number and the document of each sequence. Out: the standard error of their mean.
"""

import math
from collections import defaultdict
from collections.abc import Sequence


def standard_error(
    values: Sequence[float], documents: Sequence[int], weights: Sequence[float] | None = None
) -> float | None:
    """Compute the cluster-robust standard error of the (weighted) mean, with documents as clusters.

    Sequences of a document resemble each other, so the deviations from the mean are summed within a document before
    they are squared (Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015, section II: CR1,
    G / (G - 1) for G documents, of any sizes). With a document to each sequence and equal weights it is s / sqrt(n).

    Args:
        values: a number for each sequence.
        documents: the document of each sequence; sequences with the same number share one.
        weights: what each sequence counts for, such as its tokens; None: all alike.

    Returns:
        The standard error, None where the sequences come from fewer than two documents.
    """
    shares = [1.0] * len(values) if weights is None else weights
    total = math.fsum(shares)
    mean = math.fsum(share * value for share, value in zip(shares, values, strict=True)) / total
    deviations: defaultdict[int, list[float]] = defaultdict(list)
    for document, share, value in zip(documents, shares, values, strict=True):
        deviations[document].append(share * (value - mean))
    count = len(deviations)
    if count < 2:
        return None
    spread = math.fsum(math.fsum(within) ** 2 for within in deviations.values())
    return math.sqrt(spread * count / (count - 1)) / total
