"""measure_accuracy: parent and children on multiple-choice tasks, paired on the same questions (lm-eval).

In: the tasks that params name, from Parquet files or the hub; the parent, the assembled child, and the distilled child
if it exists. Out: children/<target>/accuracy.json, which says so if params name no task. Run:
`puzzle stage measure_accuracy --target like-51b`. lm-eval is the extra `eval`, so tasks.puzzle.quality.harness is
imported only where there is a task.
"""

import importlib.util
import string
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.checkpoints import Checkpoint
from storage.files import InputError, write_sealed
from storage.params import Params
from storage.parent_info import REBUILD
from storage.paths import Paths
from storage.remote import fetch
from storage.sections import AccuracyTask
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.quality.accuracy import PARENT, Answers, Question, TaskAccuracy, accuracy_table, compare

if TYPE_CHECKING:
    from tasks.puzzle.quality.harness import Tasks

_EXTRA = ("lm_eval", "accelerate")
"""Packages of the extra `eval`."""


@task(cache_policy=NO_CACHE)
def plan_tasks(params: Params) -> list[AccuracyTask]:
    """Return the tasks that params name, after a check of each: a wrong one stops the stage before a model loads.

    Raises:
        InputError: the extra `eval` is not installed, or a task cannot be used.
    """
    accuracy_tasks = list(params.measure_accuracy.tasks)
    if accuracy_tasks and not all(importlib.util.find_spec(name) for name in _EXTRA):
        raise InputError(
            "measure_accuracy.tasks needs lm-eval, which is not installed; "
            "run `.venv/bin/pip install -c constraints.txt -e '.[eval]'`, or empty the list"
        )
    for accuracy_task in accuracy_tasks:
        _for_lm_eval(accuracy_task, questions_of(accuracy_task))
    return accuracy_tasks


def questions_of(accuracy_task: AccuracyTask) -> list[Question]:
    """Read the questions of the task's file; none for a task whose questions lm-eval loads itself."""
    if accuracy_task.path is None:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        return read_questions(fetch(accuracy_task.path, Path(scratch)), accuracy_task)


def _for_lm_eval(accuracy_task: AccuracyTask, questions: list[Question]) -> "Tasks":
    """Make the task in lm-eval's form. lm-eval stores a model's answers in it, so every model needs a new one."""
    from tasks.puzzle.quality.harness import hub_tasks, local_tasks

    if accuracy_task.path:
        return local_tasks(accuracy_task.name, questions)
    return hub_tasks(accuracy_task.name, accuracy_task.metric)


def read_questions(file: Path, accuracy_task: AccuracyTask) -> list[Question]:
    """Read the questions of a Parquet file.

    Args:
        file: the local copy of the task's `path`.
        accuracy_task: names the columns: those in `prompt`, `choices` (list of strings), `label` (index of the right
            choice).

    Raises:
        InputError: the file is not Parquet, a column is missing or has another type, a row is not a question, or the
            file has too few rows.
    """
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{accuracy_task.path} is not a Parquet file ({error}); convert it") from error
    fields = [name for _, name, _, _ in string.Formatter().parse(accuracy_task.prompt) if name is not None]
    for column in (*fields, accuracy_task.choices, accuracy_task.label):
        if column not in table.column_names:
            raise InputError(
                f"{accuracy_task.path} has no column {column!r} (has: {', '.join(table.column_names)}); "
                f"name them in prompt, choices and label of measure_accuracy.tasks {accuracy_task.name!r}"
            )
    rows = table.select(list(dict.fromkeys((*fields, accuracy_task.choices, accuracy_task.label)))).to_pylist()
    fewest = max(2, (accuracy_task.num_fewshot or 0) + 1)
    if len(rows) < fewest:
        raise InputError(
            f"{accuracy_task.path} has {len(rows)} rows; task {accuracy_task.name!r} needs at least {fewest}"
        )
    return [_question(row, fields, accuracy_task, index) for index, row in enumerate(rows)]


def _question(row: dict[str, Any], fields: list[str], accuracy_task: AccuracyTask, index: int) -> Question:
    choices, label = row[accuracy_task.choices], row[accuracy_task.label]
    is_list_of_texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not is_list_of_texts or len(choices) < 2 or not isinstance(label, int) or not 0 <= label < len(choices):
        raise InputError(
            f"{accuracy_task.path}, row {index}: expected in {accuracy_task.choices!r} a list of two or more texts and "
            f"in {accuracy_task.label!r} the index of the right one, found {choices!r:.80} and {label!r:.20}"
        )
    if empty := [name for name in fields if row[name] is None]:
        raise InputError(f"{accuracy_task.path}, row {index}: column {empty[0]!r} is null")
    return Question(accuracy_task.prompt.format_map(row), tuple(choices), label)


@task(cache_policy=NO_CACHE)
def measure(accuracy_task: AccuracyTask, target: str, params: Params, paths: Paths) -> TaskAccuracy:
    """Ask the parent and the children of `target` the questions of one task; memory holds one model at a time."""
    from tasks.puzzle.quality.harness import Asking, answer, load

    run, questions = params.run, questions_of(accuracy_task)
    compute = prepare_compute(run.device, run.dtype, run.threads)
    sequences_per_batch = params.measure_accuracy.sequences_per_batch
    asking = Asking(accuracy_task.num_fewshot, accuracy_task.limit, run.seed, sequences_per_batch)

    def answers_of(name: str, checkpoint: Checkpoint) -> Answers:
        model, tokenizer = load(name, _verified(checkpoint), compute)
        return answer(model, tokenizer, _for_lm_eval(accuracy_task, questions), accuracy_task.metric, asking)

    answers = {name: answers_of(name, checkpoint) for name, checkpoint in _models(target, paths).items()}
    return TaskAccuracy(accuracy_task.name, accuracy_task.metric, compare(answers))


def _models(target: str, paths: Paths) -> dict[str, Checkpoint]:
    """Return the parent and the children that exist; the parent is the first."""
    models = {
        PARENT: Checkpoint(paths.parent, REBUILD),
        "assembled": Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}"),
    }
    distilled = Checkpoint(paths.distilled(target), f"dvc repro distill_child@{target}")
    return models | ({"distilled": distilled} if distilled.folder.is_dir() else {})


def _verified(checkpoint: Checkpoint) -> Path:
    """Compare every tensor of a checkpoint with its checksum; return the checkpoint's folder."""
    for tensor in checkpoint.files:
        checkpoint.tensor(tensor)
    return checkpoint.folder


@task(cache_policy=NO_CACHE)
def write_accuracy(target: str, measured: list[TaskAccuracy], params: Params, paths: Paths) -> str:
    """Write accuracy.json; `measured` are params' tasks in their order. Returns a table for people."""
    tasks = [
        {**accuracy_task.model_dump(), **result.comparison.to_json()}
        for accuracy_task, result in zip(params.measure_accuracy.tasks, measured, strict=True)
    ]
    accuracy: dict[str, object] = {"target": target, "dtype": params.run.dtype, "tasks": tasks}
    if measured:
        from tasks.puzzle.quality.harness import NAME

        accuracy["harness"] = NAME
        table = accuracy_table(target, measured, f"{NAME}, {params.run.dtype}")
    else:
        note = "no accuracy was measured: measure_accuracy.tasks in params.yaml is empty"
        accuracy["note"] = note
        table = f"{target}: {note}\n"
    write_sealed(paths.accuracy(target), accuracy)
    return table
