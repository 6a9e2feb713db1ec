"""What `make demo` prints last: every number is of the artifacts, and it fits a terminal."""

from pathlib import Path

import pytest

from flows.closing_table import closing_table
from storage.files import InputError, read_json, write_json
from storage.paths import Paths
from tests.report_run import TARGETS, write_run


def test_the_table_says_what_was_measured(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "artifacts")
    write_run(paths)
    text = closing_table(paths, list(TARGETS))
    assert max(len(line) for line in text.splitlines() if str(paths.root) not in line) <= 100
    for target in TARGETS:
        found = read_json(paths.evaluation(target), "the test")
        for quality in (found["assembled"], found["distilled"]):
            assert f"{quality['kl']:.3f} ± {quality['kl_stderr']:.3f}" in text
        for one in found["constraints"]:
            assert f"{one['predicted']:.3f} {one['measured']:>9.3f}" in text
        for one in found["exports"]["formats"].values():
            assert f"KL {one['kl']:.6f} ± {one['kl_stderr']:.6f}, perplexity {one['perplexity']:.3f}" in text
    of_decode = [line.split() for line in text.splitlines() if "decode tokens/s, batch 2" in line]
    # the child 1.23 times as fast and predicted so, from 0.8 of the bytes, on a machine 1 / 1.05 as fast as the timed
    assert [line[-5:] for line in of_decode] == [["1.230", "2.0%", "1.230", "1.250", "0.952"]] * 2 * len(TARGETS)
    of_prompt = [line.split()[-5:] for line in text.splitlines() if "prompt tokens/s, batch 1" in line]
    assert of_prompt == [["1.230", "2.0%", "-", "-", "-"]] * 2 * len(TARGETS)


def test_a_limit_that_the_measured_child_misses_is_marked(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "artifacts")
    write_run(paths)
    found = read_json(paths.evaluation("small"), "the test")
    wrong = {"at_most": 1.01, "at_least": 0.99}
    for one in found["constraints"]:
        one["measured"] = one["limit"] * wrong[one["kind"]]
    write_json(paths.evaluation("small"), found)
    assert closing_table(paths, ["small"]).count("MISSED") == len(found["constraints"]) == 2
    for one in found["constraints"]:
        one["measured"] = one["limit"]
    write_json(paths.evaluation("small"), found)
    assert "MISSED" not in closing_table(paths, ["small"])


def test_an_evaluation_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dvc repro evaluate_child@large"):
        closing_table(Paths(tmp_path), ["large"])
