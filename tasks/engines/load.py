"""What a load of requests measured: tokens/s of the server and of each user, waiting times, errors. No torch.

In: answers of one concurrency, rows of a table. Out: rows of serving.parquet, and tables for people.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from storage.records import ServingLoad, ServingRow
from tasks.engines.client import Answer
from tasks.puzzle.throughput import SCENARIO_NAMES, parent_first, rank, scaled_lengths

_PERCENTILES = (50, 95, 99)


def summary(asked: ServingLoad, answers: Sequence[Answer]) -> ServingRow:
    """A row of one concurrency; times and rates are of the requests that came whole, null where none did.

    tokens/s: generated tokens of whole answers over the seconds from the first request to the last answer, failed ones
    included. Per user: the median request's tokens/s from its first token on. Time to first token and the times between
    two events of a stream (inter-token latency, where each event is a token) as percentiles over all of them.
    """
    whole = [answer for answer in answers if answer.error is None]
    seconds = max(answer.ended for answer in answers) - min(answer.started for answer in answers)
    waits = [1e3 * answer.arrivals[0] for answer in whole]
    gaps = [1e3 * gap for answer in whole for gap in np.diff(answer.arrivals).tolist()]
    users = [
        (answer.output_tokens - 1) / (answer.arrivals[-1] - answer.arrivals[0])
        for answer in whole
        if answer.arrivals[-1] > answer.arrivals[0]
    ]
    generated = sum(answer.output_tokens for answer in whole)
    first, between = _percentiles(waits), _percentiles(gaps)
    return ServingRow(
        **asdict(asked),
        requests=len(answers),
        errors=len(answers) - len(whole),
        error_kinds=_kinds(answers),
        counted_input_tokens=_median([answer.input_tokens for answer in whole if answer.input_tokens is not None]),
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


def _percentiles(values: Sequence[float]) -> list[float | None]:
    """Linear between neighbours; nothing of nothing."""
    return [float(np.percentile(values, share)) if values else None for share in _PERCENTILES]


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _kinds(answers: Sequence[Answer]) -> str:
    """`HTTP 429 x3; timeout x1 (HTTP 429: ...)`: every kind with how often it was, then details of each one's first."""
    counts = Counter(answer.error for answer in answers if answer.error is not None)
    first = {answer.error: " ".join(answer.detail.split()) for answer in reversed(answers) if answer.error is not None}
    kinds = [f"{kind} x{count}" for kind, count in counts.most_common()]
    details = [f"{kind}: {first[kind]}" for kind, _ in counts.most_common() if first[kind]]
    return "; ".join(kinds) + (f" ({'; '.join(details)})" if details else "")


def load_table(rows: Sequence[ServingRow]) -> str:
    """A line for each concurrency of one server and scenario; at most 100 columns."""
    one = rows[0]
    devices = f"{one.devices} device" + "s" * (one.devices > 1)
    lines = [
        f"{one.name}: {_short(one.model, 40)} at {_short(one.url, 36)}, {devices}; MEASURED",
        f"  {_lengths(one)}",
        f"  {'':>7} {'':>8} {'':>6} {'generated tokens/s':>19} {'first token, ms':>22} {'between events, ms':>24}",
        f"  {'at once':>7} {'requests':>8} {'errors':>6} {'server':>9} {'per user':>9} "
        f"{'p50':>7} {'p95':>7} {'p99':>6} {'p50':>8} {'p95':>7} {'p99':>7}",
    ]
    rows = sorted(rows, key=lambda row: row.concurrency)
    lines += map(_line, rows)
    lines += [f"  {row.concurrency} at once, ERRORS: {row.error_kinds:.78}" for row in rows if row.errors]
    return "\n".join([*lines, ""])


def _line(row: ServingRow) -> str:
    first = f"{_number(row.ttft_p50_ms):>7} {_number(row.ttft_p95_ms):>7} {_number(row.ttft_p99_ms):>6}"
    between = f"{_number(row.itl_p50_ms):>8} {_number(row.itl_p95_ms):>7} {_number(row.itl_p99_ms):>7}"
    speeds = f"{_number(row.measured_tokens_per_s):>9} {_number(row.measured_user_tokens_per_s):>9}"
    return f"  {row.concurrency:>7} {row.requests:>8} {row.errors:>6} {speeds} {first} {between}"


def comparison_table(rows: Sequence[ServingRow]) -> str:
    """The published table's layout: the most tokens/s per device of each server, and its ratio to the first's."""
    names = parent_first(row.name for row in rows)
    lines = [
        f"generated tokens/s per device at the best concurrency, MEASURED; ratio: over {names[0]}'s",
        f"  {'scenario':<29} {'server':<16} {'tokens/s/device':>15} {'at once':>8} {'devices':>8} {'errors':>7} "
        f"{'ratio':>7}",
    ]
    for work in sorted({row.work for row in rows}, key=lambda work: (rank(work[0]), work)):
        of_work = [row for row in rows if row.work == work]
        base = max((per_device(row) for row in of_work if row.name == names[0]), default=0.0)
        for name in names:
            if of_server := [row for row in of_work if row.name == name]:
                best = max(of_server, key=per_device)
                speed, errors = per_device(best), sum(row.errors for row in of_server)
                lines.append(
                    f"  {_title(best):<29} {_short(name, 16):<16} {_number(speed or None):>15} {best.concurrency:>8} "
                    f"{best.devices:>8} {errors:>7} {f'{speed / base:.3f}' if speed and base else '-':>7}"
                )
    return "\n".join(
        [*lines, *scaled_lengths({f"{row.input_tokens}/{row.output_tokens}": row.scenario for row in rows}), ""]
    )


def per_device(row: ServingRow) -> float:
    """Generated tokens/s over the devices behind the server; 0 where no request came whole."""
    return (row.measured_tokens_per_s or 0.0) / row.devices


def _title(row: ServingRow) -> str:
    return f"{SCENARIO_NAMES.get(row.scenario, '')} {row.scenario}".strip()


def _lengths(row: ServingRow) -> str:
    """What was sent, and what the server says it got."""
    text = f"{_title(row)}: {row.input_tokens} tokens in, {row.output_tokens} out"
    if f"{row.input_tokens}/{row.output_tokens}" != row.scenario:
        text += " (SCALED)"
    if row.counted_input_tokens is not None and row.counted_input_tokens != row.input_tokens:
        text += f"; the server counts {row.counted_input_tokens:g} in"
    return text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 1e4 else f"{value:,.0f}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"...{text[3 - width :]}"
