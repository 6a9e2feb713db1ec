"""Rows of benchmarks, from Parquet files or the hub, and the tasks that lm-eval makes of them.

In: the entries of `measure_accuracy.tasks`. Out: benchmarks that were checked, so that a wrong one stops the stage
before a model loads. lm-eval is the extra `eval`: tasks.puzzle.quality.harness is imported only where there is a task.
"""

import importlib.util
import string
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from storage.accuracy_sections import AccuracyTask
from storage.code_digest import code_digest
from storage.files import InputError
from storage.remote import fetch
from storage.yaml_files import read_yaml
from tasks.accuracy.models import Keep, PlannedBenchmark
from tasks.puzzle.quality.accuracy import Answers, Benchmark

if TYPE_CHECKING:
    from tasks.puzzle.quality.harness import Asking, Tasks

Row = dict[str, Any]
_EXTRA = ("lm_eval", "accelerate")
"""Packages of the extra `eval`."""
_HUB = "hub:"


def read_rows(address: str, columns: Sequence[str], used_by: str) -> list[Row]:
    """Read rows of a Parquet file, or of a data set of the hub: of its split `test`, or the first where it has none.

    Args:
        address: local path, s3:// address or hub:<id>@<revision>.
        columns: columns that there must be; others are read, too.
        used_by: the key of params.yaml that names them, for messages.

    Raises:
        InputError: it cannot be read, or lacks a column.
    """
    rows = _hub_rows(address) if address.startswith(_HUB) else _file_rows(address)
    if not rows:
        raise InputError(f"{address} has no rows; {used_by} needs some")
    for column in columns:
        if column not in rows[0]:
            raise InputError(f"{address} has no column {column!r} (has: {', '.join(rows[0])}); see {used_by}")
    return rows


def _file_rows(address: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        file = fetch(address, Path(scratch))
        try:
            rows: list[Row] = pq.read_table(file).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{address} is not a Parquet file ({error}); convert it") from error
    return rows


def _hub_rows(address: str) -> list[Row]:
    import datasets  # three seconds that files need not pay

    name, separator, revision = address.removeprefix(_HUB).partition("@")
    if not separator or not revision:
        raise InputError(f"{address} names no revision; write hub:<id>@<revision>")
    try:
        splits = datasets.load_dataset(name, revision=revision)
    except (OSError, RuntimeError, ImportError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{address} cannot be loaded ({reason}); check the network, or name a Parquet file") from error
    rows: list[Row] = splits["test" if "test" in splits else next(iter(splits))].to_list()
    return rows


def planned_task(task: AccuracyTask, seed: int, sequences_per_batch: int) -> PlannedBenchmark:
    """Check a task and prepare it.

    Raises:
        InputError: the extra `eval` is not installed, or the task cannot be asked.
    """
    if not all(importlib.util.find_spec(name) for name in _EXTRA):
        raise InputError(
            "measure_accuracy.tasks needs lm-eval, which is not installed; "
            "run `.venv/bin/pip install -c constraints.txt -e '.[eval]'`, or empty the list"
        )
    from tasks.puzzle.quality.harness import Asking, answer, chosen_filter, chosen_metric, questions_digest

    form, rows = _form(task), _questions(task)
    examples = None if task.examples is None else _rows(task, task.examples)
    tasks = _for_lm_eval(task, form, rows, examples)
    asking = Asking(
        metric=chosen_metric(tasks, task.metric),
        filter=chosen_filter(tasks, task.filter),
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        seed=seed,
        sequences_per_batch=sequences_per_batch,
        chat=task.chat,
    )

    def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, _: Keep) -> Answers:
        """lm-eval stores a model's answers in the tasks, so every model needs new ones."""
        return answer(model, tokenizer, _for_lm_eval(task, form, rows, examples), asking)

    harness = f"lm-eval {metadata.version('lm-eval')}"
    version = f"{harness}, version {next(iter(tasks.values())).VERSION}" if task.path is None else harness
    return PlannedBenchmark(
        benchmark=Benchmark(task.title, _metric_name(asking), version, task.limit),
        key=_key(form, asking, version, questions_digest(tasks, asking)),
        ask=ask,
        chat=task.chat,
    )


def _metric_name(asking: "Asking") -> str:
    return asking.metric if asking.filter == "none" else f"{asking.metric}, {asking.filter}"


def _key(form: Mapping[str, Any], asking: "Asking", version: str, questions: str) -> dict[str, Any]:
    code = code_digest("tasks.accuracy.questions:planned_task")
    return {"form": form, "asking": repr(asking), "version": version, "questions": questions, "code": code}


def _for_lm_eval(
    task: AccuracyTask, form: Mapping[str, Any], rows: Sequence[Row], examples: Sequence[Row] | None
) -> "Tasks":
    from tasks.puzzle.quality.harness import hub_tasks, local_tasks

    if task.path is None:
        return hub_tasks(task.name)
    return local_tasks(task.name, form, rows, examples, task.num_fewshot)


def _form(task: AccuracyTask) -> dict[str, Any]:
    """Return the task as lm-eval writes it; without a file, multiple choice over the columns of :func:`_question`."""
    if task.form:
        form = read_yaml(Path(task.form), "see params/accuracy for the forms that there are")
        if not isinstance(form, dict) or "output_type" not in form:
            raise InputError(f"{task.form} is no task as lm-eval writes it: expected a mapping with output_type")
        return form
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def _questions(task: AccuracyTask) -> list[Row]:
    """Read the rows of the task's file; none for a task whose questions lm-eval loads itself."""
    if task.path is None:
        return []
    rows = _rows(task, task.path)
    if len(rows) < 2:
        raise InputError(f"{task.path} has {len(rows)} rows; task {task.name!r} needs at least 2")
    return rows


def _rows(task: AccuracyTask, address: str) -> list[Row]:
    """Read rows for the task's form, or questions of the keys prompt, choices and label."""
    if task.form:
        return read_rows(address, (), f"measure_accuracy.tasks {task.name!r}")
    used_by = f"prompt, choices and label of measure_accuracy.tasks {task.name!r}"
    fields = [name for _, name, _, _ in string.Formatter().parse(task.prompt) if name is not None]
    rows = read_rows(address, (*fields, task.choices, task.label), used_by)
    return [_question(row, fields, task, f"{address}, row {index}") for index, row in enumerate(rows)]


def _question(row: Row, fields: list[str], task: AccuracyTask, place: str) -> Row:
    """Return a question: the model reads `prompt`, a space and a choice; `answer` is the index of the right choice."""
    choices, label = row[task.choices], row[task.label]
    is_list_of_texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not is_list_of_texts or len(choices) < 2 or not isinstance(label, int) or not 0 <= label < len(choices):
        raise InputError(
            f"{place}: expected in {task.choices!r} a list of two or more texts and in {task.label!r} the index of the "
            f"right one, found {choices!r:.80} and {label!r:.20}"
        )
    if empty := [name for name in fields if row[name] is None]:
        raise InputError(f"{place}: column {empty[0]!r} is null")
    return {"prompt": task.prompt.format_map(row), "choices": choices, "answer": label}
