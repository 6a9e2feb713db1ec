"""A child's quality against the parent on held-out tokens: KL, perplexity, top-1 agreement, with standard errors."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tasks.puzzle.head import TokenLosses


@dataclass(frozen=True)
class SequenceQuality:
    """Means over one sequence's positions; kl and lm_loss in nats per token, cosine of the last hidden states."""

    kl: float
    lm_loss: float
    top1_agreement: float
    cosine: float


@dataclass(frozen=True)
class Quality:
    """Means over sequences; `kl_stderr` is the standard error over them (tokens of a sequence are not independent)."""

    kl: float
    kl_stderr: float
    perplexity: float
    top1_agreement: float


def per_sequence(losses: TokenLosses) -> list[SequenceQuality]:
    """Means over the positions of each sequence; a KL of rounding size below 0 (float32 sums) counts as 0."""
    fields = (losses.kl, losses.lm_loss, losses.top1, losses.cosine)
    means = (field.double().mean(1).tolist() for field in fields)
    return [SequenceQuality(0.0 if kl < 0 else kl, *others) for kl, *others in zip(*means, strict=True)]  # nan stays


def summarise(sequences: Sequence[SequenceQuality]) -> Quality:
    """Quality over sequences of equal length."""
    return Quality(
        kl=statistics.fmean(one.kl for one in sequences),
        kl_stderr=standard_error(one.kl for one in sequences),
        perplexity=math.exp(statistics.fmean(one.lm_loss for one in sequences)),
        top1_agreement=statistics.fmean(one.top1_agreement for one in sequences),
    )


def standard_error(values: Iterable[float]) -> float:
    """Standard error of the mean; 0 for fewer than two values."""
    found = list(values)
    return statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0


@dataclass(frozen=True)
class PairedDifference:
    """KL of one model minus KL of another on the same sequences: mean and its standard error, nats per token."""

    kl_difference: float
    stderr: float


def paired_difference(one: Sequence[SequenceQuality], other: Sequence[SequenceQuality]) -> PairedDifference:
    """Compare two models on the sequences that both have been measured on, the first ones."""
    differences = [a.kl - b.kl for a, b in zip(one, other, strict=False)]
    return PairedDifference(statistics.fmean(differences), standard_error(differences))
