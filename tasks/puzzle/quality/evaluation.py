"""Quality of a child against the parent on held-out tokens: KL, perplexity, top-1 agreement, with standard errors.

In: per-token losses (tasks/puzzle/model/head.py). Out: means over each sequence and over all, and paired differences.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from storage.evaluation import PairedDifference, Quality
from tasks.puzzle.model.head import TokenLosses


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


def summarise(sequences: Sequence[SequenceQuality]) -> Quality:
    """Average the quality over sequences of equal length."""
    return Quality(
        kl=statistics.fmean(sequence.kl for sequence in sequences),
        kl_stderr=standard_error(sequence.kl for sequence in sequences),
        perplexity=math.exp(statistics.fmean(sequence.lm_loss for sequence in sequences)),
        top1_agreement=statistics.fmean(sequence.top1_agreement for sequence in sequences),
    )


def standard_error(values: Iterable[float]) -> float:
    """Compute the standard error of the mean; 0 for fewer than two values."""
    sample = list(values)
    return statistics.stdev(sample) / math.sqrt(len(sample)) if len(sample) > 1 else 0.0


def paired_difference(model: Sequence[SequenceQuality], other: Sequence[SequenceQuality]) -> PairedDifference:
    """Subtract the KL of `other` from that of `model`, on the first sequences, which both were measured on."""
    differences = [mine.kl - theirs.kl for mine, theirs in zip(model, other, strict=False)]
    return PairedDifference(statistics.fmean(differences), standard_error(differences))
