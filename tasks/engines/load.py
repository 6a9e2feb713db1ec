"""Measurements of a load of requests: tokens/s of the server and of each user, waiting times, errors. No torch.

In: answers of one concurrency. Out: rows of serving.parquet.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from storage.records import ServingLoad, ServingRow
from tasks.engines.client import Answer

_PERCENTILES = (50, 95, 99)


def summary(load: ServingLoad, answers: Sequence[Answer]) -> ServingRow:
    """The row of one concurrency; times and rates are those of whole answers, null where there is none.

    tokens/s are the generated tokens of whole answers over the seconds from the first request to the last answer,
    failed ones included. Per user they are the median request's tokens/s after what came first: an event of a stream
    has its share of the tokens. Time to first token and the times between two events (inter-token latency, where each
    event is a token) are percentiles. An answer that came at once has neither a rate per user nor times between events.
    """
    whole = [answer for answer in answers if answer.error is None]
    seconds = max(answer.ended for answer in answers) - min(answer.started for answer in answers)
    waits = [1e3 * answer.arrivals[0] for answer in whole]
    streamed = [answer for answer in whole if answer.arrivals[-1] > answer.arrivals[0]]
    gaps = [1e3 * gap for answer in streamed for gap in np.diff(answer.arrivals).tolist()]
    users = [_user_tokens_per_s(answer) for answer in streamed]
    generated = sum(answer.output_tokens for answer in whole)
    first, between = _percentiles(waits), _percentiles(gaps)
    return ServingRow(
        **asdict(load),
        requests=len(answers),
        errors=len(answers) - len(whole),
        error_kinds=_kinds(answers),
        buffered=sum(answer.is_buffered for answer in whole),
        counted_input_tokens=_median([answer.input_tokens for answer in whole if answer.input_tokens is not None]),
        counted_output_tokens=_median([answer.output_tokens for answer in whole]),
        counted_by=", ".join(sorted({answer.counted_by for answer in whole})),
        seconds=seconds,
        measured_tokens_per_s=generated / seconds if whole else None,
        measured_user_tokens_per_s=_median(users),
        ttft_p50_ms=first[0],
        ttft_p95_ms=first[1],
        ttft_p99_ms=first[2],
        itl_p50_ms=between[0],
        itl_p95_ms=between[1],
        itl_p99_ms=between[2],
    )


def _user_tokens_per_s(answer: Answer) -> float:
    """Return the tokens/s of a stream, without the tokens that came first: nothing says how long these took."""
    later = sum(arrival > answer.arrivals[0] for arrival in answer.arrivals) / len(answer.arrivals)
    return later * answer.output_tokens / (answer.arrivals[-1] - answer.arrivals[0])


def _percentiles(values: Sequence[float]) -> list[float | None]:
    """Percentiles, linear between neighbours; None where there are no values."""
    return [float(np.percentile(values, share)) if values else None for share in _PERCENTILES]


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _kinds(answers: Sequence[Answer]) -> str:
    """`HTTP 429 x3; timeout x1 (HTTP 429: ...)`: every kind with its count, then the details of its first error."""
    counts = Counter(answer.error for answer in answers if answer.error is not None)
    first = {answer.error: " ".join(answer.detail.split()) for answer in reversed(answers) if answer.error is not None}
    kinds = [f"{kind} x{count}" for kind, count in counts.most_common()]
    details = [f"{kind}: {first[kind]}" for kind, _ in counts.most_common() if first[kind]]
    return "; ".join(kinds) + (f" ({'; '.join(details)})" if details else "")
