"""Workloads, and the way from timed parts to costs: lines through noisy points, parts scaled to a whole. No torch."""

import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from storage.scenario import Scenario

Rounds = dict[str, list[float]]
"""Phase (`prefill`, `decode`) -> milliseconds of each round."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Workload:
    """The load that a model is timed with: the lengths of a request, and sequences at once."""

    lengths: Scenario
    batch: int

    @property
    def input_tokens(self) -> int:
        """Tokens that prefill reads."""
        return self.lengths.input_tokens

    @property
    def context_at_midpoint(self) -> int:
        """Tokens in the KV cache halfway through decoding, rounded down."""
        return self.lengths.input_tokens + self.lengths.output_tokens // 2


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of prefill and of one decode step, and their spread (interquartile range / median)."""

    prefill_ms: float
    decode_ms: float
    spread: float


@dataclass(frozen=True)
class Fit(Generic[K]):
    """Parts that were scaled, each phase by one factor, so that they sum to the measured time of a whole model."""

    parts: dict[K, Timing]
    prefill_factor: float
    decode_factor: float

    @property
    def text(self) -> str:
        """The factors as the table's column `how` has them."""
        factors = f"prefill x {self.prefill_factor:.3f} and decode x {self.decode_factor:.3f}"
        return f"; {factors}, so that the parent's parts sum to its measured time"


def fit_to_whole(parts: Mapping[K, Timing], counts: Mapping[K, int], whole: Timing) -> Fit[K]:
    """Scale timed parts to a model that was timed end to end; ratios between models stay as they were.

    Args:
        parts: every component's timing.
        counts: the number of each of them in the timed model.
        whole: the timing of that model.
    """
    prefill_sum = math.fsum(count * parts[name].prefill_ms for name, count in counts.items())
    decode_sum = math.fsum(count * parts[name].decode_ms for name, count in counts.items())
    prefill, decode = whole.prefill_ms / prefill_sum, whole.decode_ms / decode_sum
    scaled = {
        name: replace(part, prefill_ms=prefill * part.prefill_ms, decode_ms=decode * part.decode_ms)
        for name, part in parts.items()
    }
    return Fit(scaled, prefill, decode)


def line(sizes: Sequence[int], milliseconds: Sequence[float]) -> Callable[[int], float]:
    """The Theil-Sen line (median of pairwise slopes) through points of different sizes, never below 0."""
    points = list(zip(sizes, milliseconds, strict=True))
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2)]
    slope = max(0.0, statistics.median(slopes))
    offset = statistics.median(y - slope * x for x, y in points)
    return lambda size: max(0.0, offset + slope * size)


def spread(values: Sequence[float]) -> float:
    """Interquartile range relative to the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle if middle > 0 else 0.0
