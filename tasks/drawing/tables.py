"""The report's tables of quality, sizes and limits, as text. Measured and modelled numbers never share a column."""

from collections.abc import Sequence
from dataclasses import dataclass

from storage.architecture import ReachedLimit
from storage.evaluation import MeasuredLimit, PairedDifference, Quality
from tasks.drawing.reported_child import ReportedChild

NONE = "–"
"""A cell without a number."""


@dataclass(frozen=True)
class Table:
    """A table of text: the first `num_words` columns hold words, the others numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_words: int = 1


def children_table(children: Sequence[ReportedChild]) -> Table:
    """One row per target: how much of the parent is left, the quality after GKD, the speed."""
    columns = (
        *("child", "parameters", "of block params", "of KV cache", "KL to the parent, nats/token", "perplexity"),
        *("top-1 agreement", "throughput, measured", "throughput, predicted"),
    )
    return Table("Children; throughput relative to the parent", columns, [_child_row(child) for child in children])


def _child_row(child: ReportedChild) -> tuple[str, ...]:
    predicted, quality = child.chosen.predicted, child.evaluation.distilled if child.evaluation else None
    return (
        child.label,
        f"{predicted.params:,}",
        percent(predicted.block_params_ratio),
        percent(predicted.kv_ratio),
        _kl(quality) if quality else NONE,
        f"{quality.perplexity:.2f}" if quality else NONE,
        percent(quality.top1_agreement) if quality else NONE,
        times(child.measured_ratio),
        times(predicted.throughput_ratio),
    )


def models_table(child: ReportedChild) -> Table:
    """Every model of a target: quality on held-out sequences, sizes, speed measured and predicted."""
    assert child.evaluation is not None, child.target
    titles = {"baseline": "baseline: ", "parent": ""}
    rows = [
        (
            f"{titles.get(model.series, 'child ')}{model.name}",
            _kl(model.quality),
            _difference(model.paired),
            f"{model.quality.perplexity:.2f}",
            percent(model.quality.top1_agreement),
            str(model.sequences),
            percent(model.block_params_ratio),
            percent(model.kv_ratio),
            times(model.measured_ratio),
            times(model.predicted_ratio),
        )
        for model in child.models
    ]
    columns = (
        *("model", "KL, nats/token", "KL minus child's before GKD, same sequences", "perplexity", "top-1 agreement"),
        *("sequences", "block params", "KV cache", "throughput, measured", "throughput, predicted"),
    )
    tokens = f"{child.evaluation.tokens:,} validation tokens in {child.evaluation.sequences} sequences"
    return Table(f"{child.label}: {tokens}; ± is a standard error over sequences", columns, rows)


def limits_table(children: Sequence[ReportedChild]) -> Table:
    """Every limit of every target, with the value that the tables predict and the assembled child's measured one."""
    rows = []
    for child in children:
        limits = child.evaluation.constraints if child.evaluation else child.chosen.constraints
        rows += [_limit_row(child.label, limit) for limit in limits]
    return Table("Limits", ("child", "limit on", "unit", "limit", "predicted", "measured"), rows, num_words=3)


def _limit_row(label: str, limit: ReachedLimit) -> tuple[str, ...]:
    setting = ", ".join(text for text in (limit.hardware, limit.engine, limit.scenario) if text)
    batch = f", batch {limit.batch}" if limit.batch else ""
    measured = limit.measured if isinstance(limit, MeasuredLimit) else None
    return (
        label,
        f"{limit.metric} ({setting}{batch})" if setting else limit.metric,
        limit.unit,
        f"{'≥' if limit.kind == 'at_least' else '≤'} {limit.limit:g}",
        f"{limit.predicted:.4g}",
        NONE if measured is None else f"{measured:.4g}",
    )


def exports_table(children: Sequence[ReportedChild]) -> Table | None:
    """The distance of each exported GGUF from the child in torch, by llama.cpp itself; None where none was measured."""
    rows, tokens = [], 0
    for child in children:
        if child.evaluation is None:
            continue
        tokens = max(tokens, child.evaluation.exports.tokens)
        for export_format, quality in child.evaluation.exports.formats.items():
            row = (
                child.label,
                export_format,
                f"{quality.kl:.6f} ± {quality.kl_stderr:.6f}",
                f"{quality.perplexity:.3f}",
                f"{quality.torch_perplexity:.3f}",
                percent(quality.top1_agreement),
            )
            rows.append(row)
    columns = ("child", "format", "KL to torch, nats/token", "perplexity", "perplexity in torch", "top-1 agreement")
    caption = f"Exported GGUF files in llama.cpp against the child in torch, {tokens:,} validation tokens, measured"
    return Table(caption, columns, rows, num_words=2) if rows else None


def _kl(quality: Quality) -> str:
    return f"{quality.kl:.3f} ± {quality.kl_stderr:.3f}"


def _difference(paired: PairedDifference | None) -> str:
    return f"{paired.kl_difference:+.3f} ± {paired.stderr:.3f}" if paired else NONE


def percent(share: float | None) -> str:
    """A share as a cell."""
    return NONE if share is None else f"{share:.1%}"


def times(multiple: float | None) -> str:
    """A multiple of the parent's value as a cell."""
    return NONE if multiple is None else f"{multiple:.2f}×"
