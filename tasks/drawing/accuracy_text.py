"""Accuracy preserved as text for the terminal, and the numbers that the page shows as well: percent, ± one error."""

from collections.abc import Sequence

from storage.accuracy import RATING, Accuracy, BenchmarkAccuracy, ChildAccuracy, Estimate, PositionBucket
from tasks.drawing.numbers import NONE, with_error

AT_CHANCE = "at chance"
NO_BENCHMARK = "measure_accuracy in params.yaml names no benchmark"


def accuracy_text(accuracy: Accuracy) -> str:
    """Format what was measured of a target for a terminal, at most 100 columns."""
    if not accuracy.benchmarks and not accuracy.positions:
        return f"{accuracy.target}: no accuracy was measured ({NO_BENCHMARK})\n"
    lines = []
    if accuracy.benchmarks:
        columns = f"{'accuracy, %':>14} {'child - parent':>16} {'preserved, %':>16} {'above chance, %':>17}"
        lines.append(f"{accuracy.target:<16} {columns}")
    for benchmark in accuracy.benchmarks:
        lines.append(f"{benchmark.name}: {_conditions(benchmark)}")
        lines.append(f"  {'parent':<14} {share(benchmark.parent, benchmark):>14}{_note(benchmark)}")
        lines += [_text_row(name, child, benchmark) for name, child in benchmark.children.items()]
    lines += _combined_lines(accuracy)
    lines += _position_lines(accuracy.positions)
    lines.append(f"{accuracy.dtype}; ± one standard error, of answers to the same questions")
    return "\n".join([*lines, ""])


def _conditions(benchmark: BenchmarkAccuracy) -> str:
    chance = f", chance {100 * benchmark.chance:.1f} %" if benchmark.chance else ""
    return f"{benchmark.questions:,} questions, {benchmark.metric}{chance}"


def _note(benchmark: BenchmarkAccuracy) -> str:
    return f"   {AT_CHANCE}: nothing to preserve" if benchmark.parent_guesses else ""


def _text_row(name: str, child: ChildAccuracy, benchmark: BenchmarkAccuracy) -> str:
    difference = share(child.difference, benchmark, sign="+")
    row = f"  {name:<14} {share(child.accuracy, benchmark):>14} {difference:>16}"
    return f"{row} {share_of_parent(child.preserved):>16} {share_of_parent(child.above_chance):>17}"


def share(estimate: Estimate, benchmark: BenchmarkAccuracy, sign: str = "") -> str:
    """Format an accuracy in percent; a rating of MT-Bench as published, out of 10."""
    if benchmark.metric == RATING:
        return with_error(10 * estimate.mean, 10 * estimate.stderr, digits=2, sign=sign)
    return with_error(100 * estimate.mean, 100 * estimate.stderr, digits=1, sign=sign)


def share_of_parent(estimate: Estimate | None) -> str:
    """Format a ratio in percent; a dash where there is none."""
    return NONE if estimate is None else with_error(100 * estimate.mean, 100 * estimate.stderr, digits=1)


def _combined_lines(accuracy: Accuracy) -> list[str]:
    if accuracy.combined is None:
        return []
    models = {"parent": accuracy.combined.parent, **accuracy.combined.children}
    return [
        "(10 x MT-Bench + MMLU) / 2",
        *(f"  {name:<14} {share_of_parent(quality):>14}" for name, quality in models.items()),
    ]


def _position_lines(positions: Sequence[PositionBucket]) -> list[str]:
    if not positions:
        return []
    lines = [f"{'log-loss, nats/token':<24} {'tokens':>9} {'documents':>9} {'parent':>8}   child - parent"]
    for bucket in positions:
        size = f"{bucket.tokens:>9,} {bucket.documents:>9} {bucket.parent:>8.3f}"
        lines.append(f"  {range_text(bucket):<22} {size}   {', '.join(_child_losses(bucket))}")
    return lines


def range_text(bucket: PositionBucket) -> str:
    """Format the positions of a range in words."""
    return f"position {bucket.first:,} to {bucket.end - 1:,}"


def _child_losses(bucket: PositionBucket) -> list[str]:
    return [
        f"{name} {with_error(child.difference, child.difference_stderr, sign='+')}"
        for name, child in bucket.children.items()
    ]
