"""What `make demo` prints last: every number is of the artifacts, and it fits a terminal."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from flows.closing_table import closing_table
from storage.evaluation import read_evaluation, write_evaluation
from storage.files import InputError
from storage.metrics import METRICS
from storage.paths import Paths
from tests.report_run import TARGETS, speed_constraints, write_run


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "artifacts")
    write_run(paths)
    text = closing_table(paths, list(TARGETS))
    assert max(len(line) for line in text.splitlines() if str(paths.root) not in line) <= 100
    for target in TARGETS:
        evaluation = read_evaluation(target, paths)
        for measured in evaluation.domains.values():
            for name, quality in measured.models.items():
                ratio = quality.perplexity / measured.parent.perplexity
                row = f"{quality.kl:.3f} ± {quality.kl_stderr:.3f} {quality.perplexity:>10.2f} {ratio:>7.2f}"
                assert row in text, name
            for baseline in measured.baselines:
                paired = measured.paired[baseline]
                assert f"{baseline} {paired.kl_difference:+.3f} ± {paired.stderr:.3f}" in text
        for limit in evaluation.constraints:
            assert f"{limit.predicted:.3f} {limit.measured:>9.3f}" in text
        for export in evaluation.exports.formats.values():
            assert f"KL {export.kl:.6f} ± {export.kl_stderr:.6f}, perplexity {export.perplexity:.3f}" in text
    lines = text.splitlines()
    decode = [line.split()[-5:] for line in lines if "decode tokens/s, batch 2" in line]
    # the child 1.23 times as fast and predicted so, from 0.8 of the bytes, on a machine 1 / 1.05 as fast as the timed
    assert decode == [["1.230", "2.0%", "1.230", "1.250", "0.952"]] * 2 * len(TARGETS)
    prompt = [line.split()[-5:] for line in lines if "prompt tokens/s, batch 1" in line]
    assert prompt == [["1.230", "2.0%", "-", "-", "-"]] * 2 * len(TARGETS)
    assert lines[0].endswith(" decode")
    table = itertools.takewhile(lambda line: not line.startswith("held-out"), lines[1:])
    assert [line.split()[-2:] for line in table if line.endswith(" x")] == [["1.00", "x"], *[["1.23", "x"]] * 2]


@pytest.mark.parametrize("metric", [metric.name for metric in METRICS.values() if metric.speed])
def test_the_speed_column_is_that_of_the_targets_speed_limit(metric: str, tmp_path: Path) -> None:
    """A child 1.23 times as fast reads 1.23 x, whether more or less of the metric is better."""
    paths = Paths(tmp_path / "artifacts")
    write_run(paths, targets={"small": {"label": "Small", "constraints": speed_constraints(metric)}})
    lines = closing_table(paths, ["small"]).splitlines()
    parts = METRICS[metric].speed
    assert parts is not None
    assert lines[0].endswith(f" {parts.phase}")
    assert lines[3].startswith("Small assembled") and lines[3].endswith(" 1.23 x")
    assert max(len(line) for line in lines if str(paths.root) not in line) <= 100


def test_targets_that_limit_different_speeds_share_a_column(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "artifacts")
    slow = {"label": "Slow", "constraints": speed_constraints("time_to_first_token_ms")}
    write_run(paths, targets={"small": TARGETS["small"], "slow": slow})
    lines = closing_table(paths, ["small", "slow"]).splitlines()
    assert lines[0].endswith(" speed")
    speeds = [line.split()[-2] for line in lines[1:] if line.endswith(" x") and "tokens/s" not in line]
    assert speeds == ["1.00", "1.23", "1.23"]


def test_a_limit_that_the_measured_child_misses_is_marked(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "artifacts")
    write_run(paths)
    evaluation, wrong = read_evaluation("small", paths), {"at_most": 1.01, "at_least": 0.99}
    missed = [replace(limit, measured=limit.limit * wrong[limit.kind]) for limit in evaluation.constraints]
    write_evaluation(paths.evaluation("small"), replace(evaluation, constraints=tuple(missed)))
    assert closing_table(paths, ["small"]).count("MISSED") == len(missed) == 2
    met = [replace(limit, measured=limit.limit) for limit in evaluation.constraints]
    write_evaluation(paths.evaluation("small"), replace(evaluation, constraints=tuple(met)))
    assert "MISSED" not in closing_table(paths, ["small"])


def test_a_missing_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dvc repro evaluate_child@large"):
        closing_table(Paths(tmp_path), ["large"])
