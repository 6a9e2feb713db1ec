"""The table that `make demo` prints last: the children beside the parent, as measured.

In: evaluation.json and architecture.json of every target. Out: text of at most 100 columns. Run:
`python -m flows.closing_table`.
"""

import sys
from collections.abc import Sequence

from flows.errors import run_cleanly
from storage.architecture import read_architecture
from storage.evaluation import Evaluation, MeasuredLimit, Quality, SpeedRatio, read_evaluation
from storage.params import load
from storage.paths import Paths

_PHASES = {"prefill": "prompt tokens/s", "decode": "decode tokens/s"}


def closing_table(paths: Paths, targets: list[str]) -> str:
    """Quality, speed and limits of every child, from evaluation.json and architecture.json.

    Raises:
        InputError: one of the files is missing.
        DamagedFileError: one is not JSON, or a field is missing or has the wrong type.
    """
    evaluations = {target: read_evaluation(target, paths) for target in targets}
    lines, notes = [_titles(list(evaluations.values()))], []
    for position, (target, evaluation) in enumerate(evaluations.items()):
        predicted = read_architecture(target, paths).predicted
        if position == 0:
            parent_params = round(predicted.params / predicted.params_ratio)
            lines.append(_row("parent", parent_params, evaluation.parent, None, "1.00 x"))
        label, score, speed_up = evaluation.label, evaluation.predicted.score, evaluation.speed_up
        speed = "" if speed_up is None else f"{speed_up:.2f} x"
        lines.append(_row(f"{label} assembled", predicted.params, evaluation.assembled, score, speed))
        lines.append(_row(f"{label} distilled", predicted.params, evaluation.distilled, None, ""))
        notes += ["", *_limits(evaluation), *_speeds(evaluation.speeds), *_baselines(evaluation), *_exports(evaluation)]
        notes.append(f"  {paths.exports(target)}")
    return "\n".join([*lines, *notes, ""])


def _titles(evaluations: Sequence[Evaluation]) -> str:
    """The columns' names; the last one is the part of a request whose speed all targets limit, else `speed`."""
    metrics = [evaluation.speed_metric for evaluation in evaluations]
    phases = {metric.speed.phase for metric in metrics if metric and metric.speed}
    speed = phases.pop() if len(phases) == 1 else "speed"
    titles = f"{'model':<19} {'params':>12} {'KL':>15} {'perplexity':>11} {'top-1':>7} {'score sum':>10}"
    return f"{titles} {speed:>13}"


def _row(name: str, params: int, quality: Quality, score: float | None, speed: str) -> str:
    kl = f"{quality.kl:.3f} ± {quality.kl_stderr:.3f}"
    predicted = f"{score:.3f}" if score is not None else ""
    return (
        f"{name:<19} {params:>12,} {kl:>15} {quality.perplexity:>11.2f} "
        f"{quality.top1_agreement:>7.1%} {predicted:>10} {speed:>13}"
    )


def _limits(evaluation: Evaluation) -> list[str]:
    """Every limit with its predicted and measured value, and where the speed was measured."""
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
    """Child over parent in every engine and batch, measured, and beside it what the tables predict."""
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
    """The distance of each GGUF from the child in torch."""
    lines = [
        f"    {export_format:<12} KL {quality.kl:.6f} ± {quality.kl_stderr:.6f}, perplexity {quality.perplexity:.3f} "
        f"(torch {quality.torch_perplexity:.3f})"
        for export_format, quality in evaluation.exports.formats.items()
    ]
    return [f"  exported, in llama.cpp against torch on {evaluation.exports.tokens:,} tokens:", *lines] if lines else []


def _baselines(evaluation: Evaluation) -> list[str]:
    """The KL of each baseline minus the assembled child's on the same sequences, nats/token."""
    shown = [
        f"{name} {paired.kl_difference:+.3f} ± {paired.stderr:.3f}"
        for name, paired in evaluation.paired.items()
        if name in evaluation.baselines
    ]
    lines = [", ".join(shown[start : start + 3]) for start in range(0, len(shown), 3)]
    return ["  KL of baselines less the child's:", *(f"    {line}" for line in lines)] if lines else []


if __name__ == "__main__":
    run_cleanly(lambda: sys.stdout.write(closing_table(Paths(), list(load().targets))))
