"""The report's tables of quality, sizes and limits, as text. Measured and modelled numbers never share a column."""

from collections.abc import Sequence
from dataclasses import dataclass

from storage.architecture import ReachedLimit
from storage.documents import TRAINING_MIX
from storage.evaluation import MeasuredLimit, Quality
from tasks.drawing.numbers import NONE, counted, with_error
from tasks.drawing.reported_child import ReportedChild, ReportedModel


@dataclass(frozen=True)
class Table:
    """A table of text: the first `num_words` columns hold words, the others numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_words: int = 1


def children_table(children: Sequence[ReportedChild]) -> Table:
    """Tabulate by target how much of the parent is left, the distilled child's quality by domain, and the speed."""
    domains = list(dict.fromkeys(domain for child in children for domain in child.domains))
    texts = [*domains, *(["mean"] if len(domains) > 1 else [])]
    columns = (
        *("child", "parameters", "of block params", "of KV cache"),
        *(f"KL, {text}" for text in texts),
        *(f"perplexity, {domain}" for domain in domains),
        *("throughput, measured", "throughput, predicted"),
    )
    caption = (
        "Children as distilled; KL to the parent in nats/token; perplexity, as KL measured on held-out text, and "
        "throughput relative to the parent's"
    )
    return Table(caption, columns, [_child_row(child, domains) for child in children])


def _child_row(child: ReportedChild, domains: Sequence[str]) -> tuple[str, ...]:
    predicted, measured = child.chosen.predicted, child.evaluation.domains if child.evaluation else {}
    shown = [measured.get(domain) for domain in domains]
    mean = [_kl(child.evaluation.mean("distilled")) if child.evaluation else NONE] if len(domains) > 1 else []
    return (
        child.label,
        f"{predicted.params:,}",
        percent(predicted.block_params_ratio),
        percent(predicted.kv_ratio),
        *(_kl(quality.distilled) if quality else NONE for quality in shown),
        *mean,
        *(times(quality.distilled.perplexity / quality.parent.perplexity) if quality else NONE for quality in shown),
        times(child.measured_ratio),
        times(predicted.throughput_ratio),
    )


def quality_tables(child: ReportedChild) -> list[Table]:
    """Tabulate every model of a target: its quality in a table for each domain, then sizes and speed in one."""
    tables = [_quality_table(child, domain) for domain in child.domains]
    rows = [
        (
            _model_name(model),
            percent(model.block_params_ratio),
            percent(model.kv_ratio),
            times(model.measured_ratio),
            times(model.predicted_ratio),
        )
        for model in child.models(TRAINING_MIX)
    ]
    columns = ("model", "block params", "KV cache", "throughput, measured", "throughput, predicted")
    return [*tables, Table(f"{child.label}: sizes and speed relative to the parent", columns, rows)]


def _quality_table(child: ReportedChild, domain: str) -> Table:
    models = child.models(domain)
    parent = models[0].quality
    rows = [
        (
            _model_name(model),
            _kl(model.quality),
            with_error(model.paired.kl_difference, model.paired.stderr, sign="+") if model.paired else NONE,
            f"{model.quality.perplexity:.2f}",
            times(model.quality.perplexity / parent.perplexity),
            percent(model.quality.top1_agreement),
            str(model.sequences),
            str(model.documents),
        )
        for model in models
    ]
    columns = (
        *("model", "KL, nats/token", "KL minus the assembled child's, same sequences", "perplexity"),
        *("÷ parent's", "top-1 agreement", "sequences", "documents"),
    )
    return Table(f"{child.label} on held-out {domain} text, measured; ± clusters by document", columns, rows)


def _model_name(model: ReportedModel) -> str:
    titles = {"baseline": "baseline: ", "parent": ""}
    return f"{titles.get(model.series, 'child, ')}{model.name}"


def limits_table(children: Sequence[ReportedChild]) -> Table:
    """Tabulate every limit of every target, what the tables predict and what was measured of the assembled child."""
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
    """Tabulate how far exported GGUFs are from the child in torch, by llama.cpp; None where none was measured."""
    rows, tokens, documents = [], 0, 0
    for child in children:
        if child.evaluation is None:
            continue
        exports = child.evaluation.exports
        tokens, documents = max(tokens, exports.tokens), max(documents, exports.documents)
        for export_format, quality in exports.formats.items():
            row = (
                child.label,
                export_format,
                with_error(quality.kl, quality.kl_stderr, digits=6),
                f"{quality.perplexity:.3f}",
                f"{quality.torch_perplexity:.3f}",
                percent(quality.top1_agreement),
            )
            rows.append(row)
    columns = ("child", "format", "KL to torch, nats/token", "perplexity", "perplexity in torch", "top-1 agreement")
    size = f"{tokens:,} validation tokens of {counted(documents, 'document')}"
    caption = f"Exported GGUF files in llama.cpp against the child in torch, {size}, measured"
    return Table(caption, columns, rows, num_words=2) if rows else None


def _kl(quality: Quality) -> str:
    return with_error(quality.kl, quality.kl_stderr)


def percent(share: float | None) -> str:
    """Format a share as a cell."""
    return NONE if share is None else f"{share:.1%}"


def times(multiple: float | None) -> str:
    """Format a multiple of the parent's value as a cell."""
    return NONE if multiple is None else f"{multiple:.2f}×"
