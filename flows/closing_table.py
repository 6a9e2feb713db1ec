"""The table that `make demo` prints last: the children beside the parent, as measured.

In: evaluation.json and architecture.json of every target. Out: text of at most 100 columns. Run:
`python -m flows.closing_table`.
"""

import sys
from collections.abc import Sequence

from flows.errors import run_cleanly
from storage.architecture import read_architecture
from storage.documents import TRAINING_MIX
from storage.evaluation import (
    CHILD_STATES,
    Evaluation,
    MeasuredLimit,
    ModelName,
    SpeedRatio,
    read_evaluation,
)
from storage.params import load
from storage.paths import Paths
from tasks.drawing.numbers import counted, with_error

_PHASES = {"prefill": "prompt tokens/s", "decode": "decode tokens/s"}


def closing_table(paths: Paths, targets: list[str]) -> str:
    """Return the quality, speed and limits of every child, from evaluation.json and architecture.json.

    Raises:
        InputError: one of the files is missing.
        DamagedFileError: one is not JSON, or a field is missing or has the wrong type.
    """
    evaluations = {target: read_evaluation(target, paths) for target in targets}
    lines, notes = [_titles(list(evaluations.values()))], _domains(list(evaluations.values()))
    for position, (target, evaluation) in enumerate(evaluations.items()):
        predicted = read_architecture(target, paths).predicted
        if position == 0:
            lines += _model("parent", round(predicted.params / predicted.params_ratio), evaluation, "parent", "1.00 x")
        speed_up = evaluation.speed_up
        speed = "" if speed_up is None else f"{speed_up:.2f} x"
        for model in CHILD_STATES:
            shown = speed if model == "assembled" else ""
            lines += _model(f"{evaluation.label} {model}", predicted.params, evaluation, model, shown)
        notes += ["", *_limits(evaluation), *_speeds(evaluation.speeds), *_baselines(evaluation), *_exports(evaluation)]
        notes.append(f"  {paths.exports(target)}")
    return "\n".join([*lines, *notes, ""])


def _titles(evaluations: Sequence[Evaluation]) -> str:
    """Return the columns' names; the last one is the part of a request whose speed all targets limit, else `speed`."""
    metrics = [evaluation.speed_metric for evaluation in evaluations]
    phases = {metric.speed.phase for metric in metrics if metric and metric.speed}
    speed = phases.pop() if len(phases) == 1 else "speed"
    titles = f"{'model':<19} {'params':>9} {'text':<8} {'KL':>13} {'perplexity':>10} {'/parent':>7} {'top-1':>6}"
    return f"{titles} {'scores':>6} {speed:>8}"


def _model(name: str, params: int, evaluation: Evaluation, model: ModelName, speed: str) -> list[str]:
    """Return a line per domain, then their mean where there are several; what is no quality stands in the first."""
    parent = evaluation.mean("parent")
    texts = {domain: (quality.models[model], quality.parent) for domain, quality in evaluation.domains.items()}
    if len(texts) > 1 and model != "parent":
        texts["mean"] = evaluation.mean(model), parent
    lines = []
    for position, (text, (quality, beside)) in enumerate(texts.items()):
        start = f"{name:<19} {params / 1e6:>7,.1f} M" if position == 0 else " " * 29
        score = f"{evaluation.predicted.score:.3f}" if (position, model) == (0, "assembled") else ""
        lines.append(
            f"{start} {text:<8} {with_error(quality.kl, quality.kl_stderr):>13} {quality.perplexity:>10.2f} "
            f"{quality.perplexity / beside.perplexity:>7.2f} {quality.top1_agreement:>6.1%} {score:>6} "
            f"{speed if position == 0 else '':>8}".rstrip()
        )
    return lines


def _domains(evaluations: Sequence[Evaluation]) -> list[str]:
    """Say what each text is, how much of it was read, and what stands behind ±."""
    texts = {}
    for evaluation in evaluations:
        for domain, quality in evaluation.domains.items():
            texts[domain] = f"{quality.tokens:,} tokens of {counted(quality.documents, 'document')}"
    names = {TRAINING_MIX: "training, text of the kind that the child was trained on"}
    return [
        "held-out text, on which KL (nats/token), perplexity and top-1 agreement are measured:",
        *(f"  {names.get(domain, domain)}: {size}" for domain, size in texts.items()),
        "  ±: standard error, clustered by document; scores: the sum that predicts the assembled child's KL",
    ]


def _limits(evaluation: Evaluation) -> list[str]:
    """Return every limit with its predicted and measured value, and where the speed was measured."""
    lines = [f"{evaluation.label}: {'constraint':<20} {'limit':>9} {'predicted':>10} {'measured':>9}"]
    lines += [_limit(limit) for limit in evaluation.constraints]
    speed = evaluation.speed
    if speed:
        machine = "the timed machine" if speed.is_timed_machine else f"NOT the timed machine {speed.hardware}"
        lines.append(f"  speed measured at {speed.scenario}, batch {speed.batch}, on {machine}:")
        lines.append(f"    {speed.machine}")
    return lines


def _limit(limit: MeasuredLimit) -> str:
    sign = ">=" if limit.kind == "at_least" else "<="
    name = f"{limit.metric} ({limit.name})"
    text = f"  {name:<28} {sign}{limit.limit:>7.3f} {limit.predicted:>10.3f} {_shown(limit.measured):>9}  {limit.unit}"
    return f"{text}  MISSED" if limit.is_missed else text


def _speeds(ratios: Sequence[SpeedRatio]) -> list[str]:
    """Return child over parent in every engine and batch, measured, and beside it what the tables predict."""
    lines, last = [], ""
    for ratio in ratios:
        setting = f"{ratio.engine}, {ratio.precision}, {ratio.scenario}"
        if setting != last:
            lines.append(
                f"  {f'times the parent ({setting})':<44} {'measured':>9} {'spread':>7} {'predicted':>10} "
                f"{'bytes':>7} {'drift':>7}"
            )
            last = setting
        lines.append(
            f"    {_PHASES[ratio.phase]}, batch {ratio.batch:<20} {_shown(ratio.measured):>9} "
            f"{ratio.measured_spread:>7.1%} {_shown(ratio.predicted):>10} {_shown(ratio.read_bytes):>7} "
            f"{_shown(ratio.drift):>7}"
        )
    lines.append("    (bytes: what a decode step reads, parent over child; drift: the parent's speed as measured here")
    lines.append("    over what the timings in git predict)")
    return lines if last else []


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _exports(evaluation: Evaluation) -> list[str]:
    """Return the distance of each GGUF from the child in torch."""
    exports = evaluation.exports
    lines = [
        f"    {export_format:<12} KL {with_error(quality.kl, quality.kl_stderr, digits=6)}, "
        f"perplexity {quality.perplexity:.3f} (torch {quality.torch_perplexity:.3f})"
        for export_format, quality in exports.formats.items()
    ]
    size = f"{exports.tokens:,} tokens of {counted(exports.documents, 'document')}"
    return [f"  exported, in llama.cpp against torch on {size}:", *lines] if lines else []


def _baselines(evaluation: Evaluation) -> list[str]:
    """Return the KL of each baseline minus the assembled child's on the same sequences of each domain, nats/token."""
    lines = []
    for domain, quality in evaluation.domains.items():
        shown = [
            f"{name} {with_error(paired.kl_difference, paired.stderr, sign='+')}"
            for name, paired in quality.paired.items()
            if name in quality.baselines
        ]
        if shown:
            documents = max(baseline.documents for baseline in quality.baselines.values())
            lines.append(f"  KL of baselines less the assembled child's, {domain}, {counted(documents, 'document')}:")
        lines += [f"    {', '.join(shown[start : start + 3])}" for start in range(0, len(shown), 3)]
    return lines


if __name__ == "__main__":
    run_cleanly(lambda: sys.stdout.write(closing_table(Paths(), list(load().targets))))
