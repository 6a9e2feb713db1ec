"""HumanEval with planted models: the programs that they write are known, so pass@1 is."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.accuracy_sections import HumanEval
from storage.code_digest import ProjectCode
from storage.files import InputError
from tasks.accuracy import human_eval
from tasks.accuracy.human_eval import Problem, planned_human_eval, share_that_passes
from tasks.engines.programs import Limits

DOUBLE = Problem(
    'def double(x: int) -> int:\n    """Twice x."""\n',
    "double",
    "def check(candidate):\n    assert candidate(3) == 6\n",
)
RIGHT, WRONG, HARMFUL = "    return 2 * x", "    return x", "    import os\n    os.fork()\n    return 2 * x"


def problems(folder: Path) -> str:
    path = folder / "problems.parquet"
    row = {"prompt": DOUBLE.prompt, "entry_point": DOUBLE.entry_point, "test": DOUBLE.test}
    pq.write_table(pa.Table.from_pylist([row, {**row, "prompt": f"import math\n{DOUBLE.prompt}"}]), path)
    return str(path)


def test_the_share_of_programs_that_pass() -> None:
    limits = Limits(seconds=2, memory_mib=256)
    assert share_that_passes(DOUBLE, [RIGHT, WRONG, HARMFUL, RIGHT], limits) == 0.5


def test_pass_at_1_of_planted_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model writes one right program of two for the first problem, two for the second."""
    written = {0: [RIGHT, WRONG], 1: [RIGHT, RIGHT]}
    monkeypatch.setattr(human_eval, "continuations", lambda *arguments: iter(written[arguments[6]]))
    settings = HumanEval.model_validate({"path": problems(tmp_path), "samples": 2, "memory_mib": 256, "seconds": 2})
    planned = planned_human_eval(settings, seed=0, sequences_per_batch=8)
    answers = planned.ask(*_model(), lambda _, make: dict(make()))
    assert (answers.scores, answers.chance) == ((0.5, 1.0), (0.0, 0.0))
    assert planned.benchmark.metric == "pass@1 of 2"
    other = planned_human_eval(settings.model_copy(update={"samples": 3}), seed=0, sequences_per_batch=8)
    assert other.key != planned.key


def test_how_programs_are_confined_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """confine.py runs as a script, so no import leads to it."""
    roots: list[str] = []

    def code_digest(*names: str) -> str:
        roots.extend(names)
        return ""

    monkeypatch.setattr(human_eval, "code_digest", code_digest)
    planned_human_eval(HumanEval.model_validate({"path": problems(tmp_path), "memory_mib": 256}), 0, 1)
    reached = "\n".join(ProjectCode().reached(roots))
    assert "RLIMIT_FSIZE" in reached and "execv" in reached


def _model() -> tuple[Any, Any]:
    """Return a model that is not asked, and a tokenizer that makes no tokens."""
    return None, lambda _: {"input_ids": []}


def test_without_confinement_nothing_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Limits) -> None:
        raise InputError("this machine cannot")

    monkeypatch.setattr(human_eval, "check_confinement", refuse)
    with pytest.raises(InputError, match="this machine cannot"):
        planned_human_eval(HumanEval.model_validate({"path": problems(tmp_path)}), seed=0, sequences_per_batch=1)


def test_what_cannot_be_asked_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "def f():"}] * 2), path)
    for address, problem in (
        (str(path), "no column 'entry_point'"),
        ("hub:some/set", "names no revision"),
        (str(tmp_path / "none.parquet"), "does not exist"),
    ):
        with pytest.raises(InputError, match=problem):
            planned_human_eval(
                HumanEval.model_validate({"path": address, "memory_mib": 256}), seed=0, sequences_per_batch=1
            )
