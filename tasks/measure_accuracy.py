"""measure_accuracy: parent and children on multiple-choice tasks, paired on the same questions (lm-eval).

In: the tasks that params name, from Parquet files or the hub; the parent, the assembled child, and the distilled one
where there is one. Out: children/<target>/accuracy.json, which says so where no task was asked for. lm-eval is the
extra `eval`: only what runs with a task imports tasks.puzzle.harness.
"""

import importlib.util
import string
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.checkpoints import Checkpoint
from storage.files import InputError, write_json
from storage.params import Params
from storage.parent import REBUILD
from storage.paths import Paths
from storage.remote import fetch
from storage.sections import AccuracyTask
from tasks.puzzle.accuracy import PARENT, Question, accuracy_table, compare
from tasks.puzzle.device import compute

_EXTRA = ("lm_eval", "accelerate")


@task(cache_policy=NO_CACHE)
def plan_tasks(params: Params) -> list[AccuracyTask]:
    """The tasks that params name, each looked at once, so that a wrong one ends the stage before a model is loaded.

    Raises:
        InputError: the extra `eval` is not installed, or a task cannot be used.
    """
    wanted = list(params.measure_accuracy.tasks)
    if wanted and not all(importlib.util.find_spec(name) for name in _EXTRA):
        raise InputError(
            "measure_accuracy.tasks needs lm-eval, which is not installed; "
            "run `.venv/bin/pip install -c constraints.txt -e '.[eval]'`, or empty the list"
        )
    for one in wanted:
        _for_lm_eval(one, questions_of(one))
    return wanted


def questions_of(wanted: AccuracyTask) -> list[Question]:
    """Questions of the task's file; none where lm-eval has them."""
    if wanted.path is None:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        return read_questions(fetch(wanted.path, Path(scratch)), wanted)


def _for_lm_eval(wanted: AccuracyTask, questions: list[Question]) -> Mapping[str, Any]:
    """The task as lm-eval has it. It keeps what a model answered, so every model takes one of its own."""
    from tasks.puzzle.harness import hub_tasks, local_tasks

    return local_tasks(wanted.name, questions) if wanted.path else hub_tasks(wanted.name, wanted.metric)


def read_questions(file: Path, wanted: AccuracyTask) -> list[Question]:
    """Questions of a Parquet file.

    Args:
        file: the local copy of `wanted.path`.
        wanted: names the columns: those in its prompt, `choices` (list of strings), `label` (index of the right one).

    Raises:
        InputError: not a Parquet file, a column is missing or of another type, a row is no question, or too few rows.
    """
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{wanted.path} is not a Parquet file ({error}); convert it") from error
    fields = [name for _, name, _, _ in string.Formatter().parse(wanted.prompt) if name is not None]
    for column in (*fields, wanted.choices, wanted.label):
        if column not in table.column_names:
            raise InputError(
                f"{wanted.path} has no column {column!r} (has: {', '.join(table.column_names)}); name them in prompt, "
                f"choices and label of measure_accuracy.tasks {wanted.name!r}"
            )
    rows = table.select(list(dict.fromkeys((*fields, wanted.choices, wanted.label)))).to_pylist()
    fewest = max(2, (wanted.num_fewshot or 0) + 1)
    if len(rows) < fewest:
        raise InputError(f"{wanted.path} has {len(rows)} rows; task {wanted.name!r} needs at least {fewest}")
    return [_question(row, fields, wanted, index) for index, row in enumerate(rows)]


def _question(row: dict[str, Any], fields: list[str], wanted: AccuracyTask, index: int) -> Question:
    choices, label = row[wanted.choices], row[wanted.label]
    is_list = isinstance(choices, list) and len(choices) > 1 and all(isinstance(one, str) and one for one in choices)
    if not is_list or not isinstance(label, int) or not 0 <= label < len(choices):
        raise InputError(
            f"{wanted.path}, row {index}: expected in {wanted.choices!r} a list of two or more texts and in "
            f"{wanted.label!r} the index of the right one, found {choices!r:.80} and {label!r:.20}"
        )
    if empty := [name for name in fields if row[name] is None]:
        raise InputError(f"{wanted.path}, row {index}: column {empty[0]!r} is null")
    return Question(wanted.prompt.format_map(row), tuple(choices), label)


@task(cache_policy=NO_CACHE)
def measure(wanted: AccuracyTask, target: str, params: Params, paths: Paths) -> dict[str, Any]:
    """Ask the parent and the children of `target` the questions of one task; memory holds one model at a time.

    Returns:
        The task's entry in accuracy.json.
    """
    from tasks.puzzle.harness import Asking, answer, load

    run, questions = params.run, questions_of(wanted)
    device = compute(run.device, run.dtype, run.threads)
    asking = Asking(wanted.num_fewshot, wanted.limit, run.seed, params.measure_accuracy.sequences_per_batch)
    answers = {
        name: answer(*load(name, _verified(checkpoint), device), _for_lm_eval(wanted, questions), wanted.metric, asking)
        for name, checkpoint in _models(target, paths).items()
    }
    return {**wanted.model_dump(), **compare(answers)}


def _models(target: str, paths: Paths) -> dict[str, Checkpoint]:
    """The parent, and the children that there are."""
    models = {
        PARENT: Checkpoint(paths.parent, REBUILD),
        "assembled": Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}"),
    }
    distilled = Checkpoint(paths.distilled(target), f"dvc repro distill_child@{target}")
    return models | ({"distilled": distilled} if distilled.folder.is_dir() else {})


def _verified(checkpoint: Checkpoint) -> Path:
    """Its folder, after every tensor was compared with its checksum."""
    for tensor in checkpoint.files:
        checkpoint.tensor(tensor)
    return checkpoint.folder


@task(cache_policy=NO_CACHE)
def write_accuracy(target: str, measured: list[dict[str, Any]], params: Params, paths: Paths) -> str:
    """Write accuracy.json; returns it as a table for people."""
    accuracy: dict[str, Any] = {"target": target, "dtype": params.run.dtype, "tasks": measured}
    if measured:
        from tasks.puzzle.harness import NAME

        accuracy["harness"] = NAME
    else:
        accuracy["note"] = "no accuracy was measured: measure_accuracy.tasks in params.yaml is empty"
    write_json(paths.accuracy(target), accuracy)
    return accuracy_table(accuracy)
