"""Quality of a child against the parent on held-out tokens: KL, perplexity, top-1 agreement, with standard errors.

In: per-token losses (tasks/puzzle/model/head.py), and the document of each sequence, by which errors are clustered.
Out: means over each sequence and over all, and paired differences.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from storage.evaluation import PairedDifference, Quality
from tasks.puzzle.model.head import TokenLosses
from tasks.puzzle.standard_error import standard_error


@dataclass(frozen=True)
class SequenceQuality:
    """Means over one sequence's tokens.

    kl, lm_loss: nats per token; top1_agreement: share of tokens; cosine: similarity of the last hidden states.
    """

    kl: float
    lm_loss: float
    top1_agreement: float
    cosine: float


def per_sequence(losses: TokenLosses) -> list[SequenceQuality]:
    """Average over each sequence's tokens; a KL below 0, which comes from rounding in float32 sums, counts as 0."""
    fields = (losses.kl, losses.lm_loss, losses.top1, losses.cosine)
    means = (field.double().mean(1).tolist() for field in fields)
    return [SequenceQuality(0.0 if kl < 0 else kl, *others) for kl, *others in zip(*means, strict=True)]  # nan stays


def summarise(sequences: Sequence[SequenceQuality], documents: Sequence[int]) -> Quality:
    """Average the quality over sequences of equal length; `documents` has the document of each."""
    return Quality(
        kl=statistics.fmean(sequence.kl for sequence in sequences),
        kl_stderr=standard_error([sequence.kl for sequence in sequences], documents),
        perplexity=math.exp(statistics.fmean(sequence.lm_loss for sequence in sequences)),
        top1_agreement=statistics.fmean(sequence.top1_agreement for sequence in sequences),
    )


def paired_difference(
    model: Sequence[SequenceQuality], other: Sequence[SequenceQuality], documents: Sequence[int]
) -> PairedDifference:
    """Subtract the KL of `other` from that of `model`, on the first sequences, which both were measured on.

    `documents` has the document of each sequence.
    """
    differences = [mine.kl - theirs.kl for mine, theirs in zip(model, other, strict=False)]
    return PairedDifference(statistics.fmean(differences), standard_error(differences, documents[: len(differences)]))
