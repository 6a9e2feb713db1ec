"""When a replacement has been scored on enough sequences: its error is small, or it is beaten beyond all error.

In: KL of replacements, sequence by sequence, in the same order for all. Nothing is decided on fewer than
LEAST_SEQUENCES; what is decided depends on the sequences so far alone, so a run that is repeated decides the same.
Decisions are repeated after every batch, hence three standard errors and not two.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEAST_SEQUENCES = 8
BEYOND = 3.0
"""Standard errors of a paired difference that count as beaten."""


@dataclass(frozen=True)
class Contender:
    """A subblock's variant: parameters, KV bytes per token, and its replacement's KL so far, nats/token."""

    params: int
    kv_bytes: int
    kl: tuple[float, ...]


def is_settled(kl: Sequence[float], relative_error: float) -> bool:
    """Whether the standard error of the mean is at most this share of the mean; 0 asks for all sequences."""
    if len(kl) < LEAST_SEQUENCES or relative_error == 0:
        return False
    return statistics.stdev(kl) / math.sqrt(len(kl)) <= relative_error * statistics.fmean(kl)


def is_dominated(one: Contender, others: Iterable[Contender]) -> bool:
    """Whether a variant of the same subblock that is no larger has a lower KL, beyond the error of the difference."""
    return any(_is_beaten(one.kl, other.kl) for other in others if _is_no_larger(other, one))


def _is_no_larger(other: Contender, one: Contender) -> bool:
    return other is not one and other.params <= one.params and other.kv_bytes <= one.kv_bytes


def _is_beaten(one: Sequence[float], other: Sequence[float]) -> bool:
    """Paired over the sequences that both were scored on."""
    differences = [mine - theirs for mine, theirs in zip(one, other, strict=False)]
    if len(differences) < LEAST_SEQUENCES:
        return False
    stderr = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) > BEYOND * stderr
