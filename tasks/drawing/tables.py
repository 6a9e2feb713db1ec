"""The report's tables: what the artifacts hold, as text. Measured and modelled numbers never share a column."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from storage.records import ThroughputRow
from tasks.drawing.facts import Child, measured_ratio_of, model_names, predicted_of, quality_of
from tasks.puzzle.throughput import rank

NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table of text: the first `num_words` columns hold words, the others numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_words: int = 1


def children_table(children: Sequence[Child]) -> Table:
    """One line per target: how much of the parent is left, what it costs in quality, what it gains in speed."""
    rows = []
    for child in children:
        predicted, quality = child.chosen["predicted"], quality_of(child, child.final) if child.evaluation else None
        rows.append(
            (
                child.label,
                f"{predicted['params']:,}",
                _percent(predicted["block_params_ratio"]),
                _percent(predicted["kv_ratio"]),
                _kl(quality) if quality else NONE,
                f"{quality['perplexity']:.2f}" if quality else NONE,
                _percent(quality["top1_agreement"]) if quality else NONE,
                _times(child.measured_ratio),
                _times(predicted["throughput_ratio"]),
            )
        )
    columns = (
        *("child", "parameters", "of block params", "of KV cache", "KL to the parent, nats/token", "perplexity"),
        *("top-1 agreement", "throughput, measured", "throughput, predicted"),
    )
    return Table("Children; throughput relative to the parent", columns, rows)


def models_table(child: Child) -> Table:
    """Every model of a target: quality measured on the same sequences, speed measured or predicted."""
    assert child.evaluation is not None, child.target
    paired = child.evaluation.get("paired") or {}
    rows = []
    for key, name, series in model_names(child):
        quality, predicted = quality_of(child, key), predicted_of(child, key)
        rows.append(
            (
                {"baseline": f"baseline: {name}", "parent": "parent"}.get(series, f"child {name}"),
                _kl(quality),
                _difference(paired.get(key)),
                f"{quality['perplexity']:.2f}",
                _percent(quality["top1_agreement"]),
                str(quality.get("sequences", child.evaluation["sequences"])),
                _percent(predicted.get("block_params_ratio")),
                _percent(predicted.get("kv_ratio")),
                _times(measured_ratio_of(child, key)),
                _times(predicted.get("throughput_ratio") if child.setting else None),
            )
        )
    columns = (
        *("model", "KL, nats/token", "KL minus child's before GKD, same sequences", "perplexity", "top-1 agreement"),
        *("sequences", "block params", "KV cache", "throughput, measured", "throughput, predicted"),
    )
    tokens = f"{child.evaluation['tokens']:,} validation tokens in {child.evaluation['sequences']} sequences"
    return Table(f"{child.label}: {tokens}; ± is a standard error over sequences", columns, rows)


def constraints_table(children: Sequence[Child]) -> Table:
    """Every limit: what was asked, what the tables predicted, what the assembled child measures."""
    rows = []
    for child in children:
        for one in (child.evaluation or child.chosen)["constraints"]:
            sign = "≥" if one["kind"] == "at_least" else "≤"
            where = ", ".join(str(one[key]) for key in ("hardware", "engine", "scenario") if one.get(key))
            batch = f", batch {one['batch']}" if one.get("batch") else ""
            rows.append(
                (
                    child.label,
                    f"{one['metric']} ({where}{batch})" if where else one["metric"],
                    one["unit"],
                    f"{sign} {one['limit']:g}",
                    f"{one['predicted']:.4g}",
                    NONE if one.get("measured") is None else f"{one['measured']:.4g}",
                )
            )
    return Table("Limits", ("child", "limit on", "unit", "limit", "predicted", "measured"), rows, num_words=3)


def measured_throughput(child: Child) -> list[Table]:
    """Tokens/s of parent and child on this machine, as timed and as the cost table predicts; a table an engine."""
    pairs = _pairs(row for row in child.throughput if row.modelled_tokens_per_s is None)
    engines = dict.fromkeys(own.engine for _, own in pairs)
    return [_measured_table(child.label, [pair for pair in pairs if pair[1].engine == engine]) for engine in engines]


def _measured_table(label: str, pairs: Sequence[tuple[ThroughputRow, ThroughputRow]]) -> Table:
    rows = [
        (
            own.phase,
            own.scenario,
            str(own.batch),
            _tokens(parent.measured_tokens_per_s),
            _tokens(own.measured_tokens_per_s),
            _times(_over(own.measured_tokens_per_s, parent.measured_tokens_per_s)),
            _percent(max(parent.measured_spread or 0.0, own.measured_spread or 0.0)),
            _tokens(parent.predicted_tokens_per_s),
            _tokens(own.predicted_tokens_per_s),
            _times(_over(own.predicted_tokens_per_s, parent.predicted_tokens_per_s)),
        )
        for parent, own in pairs
    ]
    columns = (
        *("phase", "scenario", "batch", "parent, measured", "child, measured", "ratio, measured", "spread"),
        *("parent, predicted", "child, predicted", "ratio, predicted"),
    )
    _, at = pairs[0]
    threads = f", {at.threads} thread{'s' * (at.threads > 1)}" if at.threads else ""
    timed = next((own.predicted_hardware for _, own in pairs if own.predicted_hardware), None)
    tables = f"; predicted from the timings of {timed}" if timed else ""
    where = f"{at.machine}; {at.engine}, {at.precision}{threads}; {at.versions}{tables}"
    return Table(f"{label}: tokens/s, measured on {where}", columns, rows, num_words=2)


def exports_table(children: Sequence[Child]) -> Table | None:
    """How far each exported GGUF is from the child in torch, as llama.cpp computes it; None where none was measured."""
    rows, tokens = [], 0
    for child in children:
        found = (child.evaluation or {}).get("exports") or {"formats": {}}
        tokens = max(tokens, found.get("tokens", 0))
        rows += [
            (
                child.label,
                name,
                f"{one['kl']:.6f} ± {one['kl_stderr']:.6f}",
                f"{one['perplexity']:.3f}",
                f"{one['torch_perplexity']:.3f}",
                _percent(one["top1_agreement"]),
            )
            for name, one in found["formats"].items()
        ]
    columns = ("child", "format", "KL to torch, nats/token", "perplexity", "perplexity in torch", "top-1 agreement")
    caption = f"Exported GGUF files in llama.cpp against the child in torch, {tokens:,} validation tokens, measured"
    return Table(caption, columns, rows, num_words=2) if rows else None


def modelled_throughput(child: Child) -> Table | None:
    """Tokens/s of parent and child on hardware that was modelled, none of it measured; None without any."""
    pairs = _pairs(row for row in child.throughput if row.modelled_tokens_per_s is not None)
    if not pairs:
        return None
    pairs.sort(key=lambda pair: rank(pair[0].scenario))
    rows = [
        (
            own.scenario,
            f"{parent.batch}, {parent.tensor_parallel}",
            f"{own.batch}, {own.tensor_parallel}",
            _tokens(parent.modelled_tokens_per_s),
            _tokens(own.modelled_tokens_per_s),
            _times(_over(own.modelled_tokens_per_s, parent.modelled_tokens_per_s)),
        )
        for parent, own in pairs
    ]
    columns = (
        *("scenario", "parent's batch, devices", "child's batch, devices"),
        *("parent, modelled", "child, modelled", "ratio, modelled"),
    )
    _, at = pairs[0]
    caption = (
        f"{child.label}: generated tokens/s per device, modelled for {at.hardware} ({at.engine}, {at.precision}), not "
        "measured"
    )
    return Table(caption, columns, rows)


def _pairs(rows: Iterable[ThroughputRow]) -> list[tuple[ThroughputRow, ThroughputRow]]:
    """(parent's row, child's row) of the same setting; modelled ones each have their own best batch and devices."""
    found: dict[tuple[object, ...], dict[str, ThroughputRow]] = {}
    for row in rows:
        at = (row.batch, row.tensor_parallel) if row.modelled_tokens_per_s is None else None
        key = (row.hardware, row.engine, row.precision, row.phase, row.scenario, at)
        found.setdefault(key, {})[row.model] = row
    return [(both["parent"], both["child"]) for both in found.values() if len(both) == 2]


def _over(child: float | None, parent: float | None) -> float | None:
    return child / parent if child is not None and parent else None


def _kl(quality: dict[str, Any]) -> str:
    return f"{quality['kl']:.3f} ± {quality['kl_stderr']:.3f}"


def _difference(paired: dict[str, Any] | None) -> str:
    return f"{paired['kl_difference']:+.3f} ± {paired['stderr']:.3f}" if paired else NONE


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}×"


def _tokens(rate: float | None) -> str:
    return NONE if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
