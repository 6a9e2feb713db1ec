"""Measurements of servers under load as tables for people. No torch.

In: rows of serving.parquet. Out: text.
"""

from collections.abc import Sequence

from storage.records import ServingRow
from tasks.drawing.throughput_text import SCENARIO_NAMES, parent_first, rank, scaled_lengths


def load_table(rows: Sequence[ServingRow]) -> str:
    """Format a line for each concurrency of one server and scenario; at most 100 columns."""
    first = rows[0]
    devices = f"{first.devices} device" + "s" * (first.devices > 1)
    lines = [
        f"{first.name}: {_short(first.model, 40)} at {_short(first.url, 36)}, {devices}; MEASURED",
        f"  {_lengths(first)}",
        f"  {'':>7} {'':>8} {'':>6} {'generated tokens/s':>19} {'first token, ms':>22} {'between events, ms':>24}",
        f"  {'at once':>7} {'requests':>8} {'errors':>6} {'server':>9} {'per user':>9} "
        f"{'p50':>7} {'p95':>7} {'p99':>6} {'p50':>8} {'p95':>7} {'p99':>7}",
    ]
    rows = sorted(rows, key=lambda row: row.concurrency)
    lines += map(_line, rows)
    lines += [f"  {row.concurrency} at once, ERRORS: {row.error_kinds:.78}" for row in rows if row.errors]
    lines += map(_buffered, filter(lambda row: row.buffered, rows))
    lines += [f"  {row.concurrency} at once: measured THROUGH A PROXY" for row in rows if row.route == "proxy"]
    lines += _counted(rows)
    return "\n".join([*lines, ""])


def _line(row: ServingRow) -> str:
    first = f"{_number(row.ttft_p50_ms):>7} {_number(row.ttft_p95_ms):>7} {_number(row.ttft_p99_ms):>6}"
    between = f"{_number(row.itl_p50_ms):>8} {_number(row.itl_p95_ms):>7} {_number(row.itl_p99_ms):>7}"
    user = _number(row.measured_user_tokens_per_s)
    if row.measured_user_tokens_per_s is None and row.buffered:
        user = "buffered"
    speeds = f"{_number(row.measured_tokens_per_s):>9} {user:>9}"
    return f"  {row.concurrency:>7} {row.requests:>8} {row.errors:>6} {speeds} {first} {between}"


def _buffered(row: ServingRow) -> str:
    share = f"{row.buffered} of {row.requests - row.errors} answers"
    return f"  {row.concurrency} at once, BUFFERED: {share} came at once, so first token = last, no rate per user"


def _counted(rows: Sequence[ServingRow]) -> list[str]:
    """Say how many tokens came and who counted them, where answers are not of one length that the server counts."""
    counts: dict[str, list[float]] = {}
    for row in rows:
        if row.counted_output_tokens is not None and (row.prompt_kind == "text" or row.counted_by != "usage"):
            counts.setdefault(row.counted_by, []).append(row.counted_output_tokens)
    return [
        f"  medians of {min(medians):g} to {max(medians):g} tokens came out, counted by {counted_by}"
        for counted_by, medians in counts.items()
    ]


def comparison_table(rows: Sequence[ServingRow]) -> str:
    """Format a table in the published layout: the most tokens/s per device of each server, its ratio to the first's."""
    names = parent_first(row.name for row in rows)
    lines = [
        f"generated tokens/s per device at the best concurrency, MEASURED; ratio: over {names[0]}'s",
        f"  {'scenario':<29} {'server':<16} {'tokens/s/device':>15} {'at once':>8} {'devices':>8} {'errors':>7} "
        f"{'ratio':>7}",
    ]
    for work in sorted({row.comparison_key for row in rows}, key=lambda work: (rank(work[0]), work)):
        compared = [row for row in rows if row.comparison_key == work]
        base = max((per_device(row) for row in compared if row.name == names[0]), default=0.0)
        for name in names:
            if server_rows := [row for row in compared if row.name == name]:
                best = max(server_rows, key=per_device)
                speed, errors = per_device(best), sum(row.errors for row in server_rows)
                title = _title(best) + " *" * (best.prompt_kind == "text")
                lines.append(
                    f"  {title:<29} {_short(name, 16):<16} {_number(speed or None):>15} {best.concurrency:>8} "
                    f"{best.devices:>8} {errors:>7} {f'{speed / base:.3f}' if speed and base else '-':>7}"
                )
    if any(row.prompt_kind == "text" for row in rows):
        lines.append("  * text prompts: answers may be shorter than the length asked for")
    if proxied := sorted({row.name for row in rows if row.route == "proxy"}):
        lines.append(f"  through a proxy, whose time counts: {', '.join(proxied)}")
    return "\n".join(
        [*lines, *scaled_lengths({f"{row.input_tokens}/{row.output_tokens}": row.scenario for row in rows}), ""]
    )


def per_device(row: ServingRow) -> float:
    """Return the generated tokens/s for each device behind the server; 0 where no answer came whole."""
    return (row.measured_tokens_per_s or 0.0) / row.devices


def _title(row: ServingRow) -> str:
    return f"{SCENARIO_NAMES.get(row.scenario, '')} {row.scenario}".strip()


def _lengths(row: ServingRow) -> str:
    """Say which lengths were sent, and the input length that the server counts where it differs."""
    kind, most = ("as text ", "at most ") if row.prompt_kind == "text" else ("", "")
    text = f"{_title(row)}: {row.input_tokens} tokens {kind}in, {most}{row.output_tokens} out"
    if f"{row.input_tokens}/{row.output_tokens}" != row.scenario:
        text += " (SCALED)"
    if row.counted_input_tokens is not None and row.counted_input_tokens != row.input_tokens:
        text += f"; the server counts {row.counted_input_tokens:g} in"
    return text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 1e4 else f"{value:,.0f}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"...{text[3 - width :]}"
