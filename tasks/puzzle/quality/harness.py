"""Runs lm-eval in this process: a task and a model in memory -> a score of 0 .. 1 for every question.

Any task of lm-eval will do whose metric is a mean over questions: multiple choice (the choice with the highest
log-likelihood counts, or with the highest per character), texts that are compared with the right answer, and what tasks
compute themselves. The module needs the extra `eval`, so it is imported only where params name a task.
"""

import difflib
import functools
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import lm_eval.api.metrics
import lm_eval.api.model
import lm_eval.api.registry
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from storage.files import InputError, digest_of
from tasks.puzzle.quality.accuracy import Answers

Tasks: TypeAlias = Mapping[str, ConfigurableTask]
"""lm-eval's tasks by name: a single task, or the members of a group, whose questions are put together."""
Row: TypeAlias = dict[str, Any]
_DEFAULT_METRICS = ("acc_norm", "acc")
_CHOSEN = {"acc", "acc_norm", "acc_bytes"}
"""Metrics of multiple choice, where a guesser has a chance."""


def _bar(*args: Any, **options: Any) -> Any:
    """Replace lm-eval's progress bar by one that is quiet where stderr is not a terminal, as our own are."""
    return tqdm(*args, **{**options, "disable": None})


lm_eval.api.model.tqdm = lm_eval.api.task.tqdm = lm_eval.models.huggingface.tqdm = _bar
# Warnings about what we do on purpose: we pass models as objects and questions as a function.
_EXPECTED_WARNINGS = ("`pretrained`", "Custom kwargs can be passed", "is already in self.", "num_fewshot > 0 but")
for _logger in ("lm_eval.models.huggingface", "lm_eval.api.task"):
    logging.getLogger(_logger).addFilter(lambda record: not any(text in record.msg for text in _EXPECTED_WARNINGS))


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Measure ROUGE-L, the F1 of the longest common subsequence of words, English ones, not reduced to their stems."""
    from rouge_score.rouge_scorer import RougeScorer  # it imports nltk, which other tasks need not pay

    score = RougeScorer(["rougeL"]).score(references[0], predictions[0])["rougeL"]
    return float(score.fmeasure)


def probability_of_true(question: Row, answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return TruthfulQA's mc2: the share of probability that the model gives to the true answers of a question."""
    likelihood = np.exp([log_likelihood for log_likelihood, _ in answers])
    is_true = np.asarray(_truths(question)) == 1
    return {"acc": float(likelihood[is_true].sum() / likelihood.sum())}


def _truths(question: Row) -> list[int]:
    """Mark each true answer of a TruthfulQA question with 1, others with 0, in the columns of a file or of the hub."""
    truths: list[int] = question["mc2_labels"] if "mc2_labels" in question else question["mc2_targets"]["labels"]
    return truths


_METRICS: Mapping[str, Callable[..., Any]] = {"rouge_l": rouge_l}
"""Functions that a form can name as a metric, beside lm-eval's own."""
_PROCESSES: Mapping[str, Callable[..., Any]] = {"probability_of_true": probability_of_true}
"""Functions that a form can name as `process_results`."""


def local_tasks(
    name: str, form: Mapping[str, Any], rows: Sequence[Row], examples: Sequence[Row] | None, num_fewshot: int | None
) -> Tasks:
    """Make a task of the user's own rows.

    Args:
        name: the task's name.
        form: the task as lm-eval writes it, without a data set; `group_by` names a column whose values make a task
            each (MMLU's subjects), so that examples are of the same kind as the question.
        rows: the questions.
        examples: the examples before a question; None takes other questions.
        num_fewshot: number of examples before each question; None is the form's own number.

    Raises:
        InputError: lm-eval does not take the form, or it does not fit the rows.
    """
    place = f"measure_accuracy.tasks {name!r}"
    config = {key: setting for key, setting in form.items() if key != "group_by"}
    if "process_results" in form:
        config["process_results"] = _function_named(form["process_results"], "process_results", _PROCESSES, place)
    config["metric_list"] = _metrics(form, place)
    shots = (form.get("num_fewshot") or 0) if num_fewshot is None else num_fewshot
    if not isinstance(shots, int) or shots < 0:
        raise InputError(f"{place}: expected as num_fewshot of its form a number of examples, found {shots!r:.40}")
    fewest = max(1, shots + 1 if examples is None else shots)
    tasks = {}
    for kind, (questions, kind_examples) in _grouped(form.get("group_by"), rows, examples, place).items():
        task = f"{name}_{kind}" if kind else name
        splits = {"test": questions, "examples": questions if examples is None else kind_examples}
        if len(splits["examples"]) < fewest:
            of_kind = f" of {kind!r}, which is asked" if kind else ""
            raise InputError(
                f"{place}: num_fewshot {shots} needs at least {fewest} rows to take examples from, found "
                f"{len(splits['examples'])}{of_kind}; lower num_fewshot, or add examples"
            )
        tasks[task] = _local_task({**config, "task": task}, splits, is_own=examples is None)
    return tasks


def _function_named(name: Any, key: str, functions: Mapping[str, Any], place: str) -> Any:
    """Return what a form names: a function of this module, or lm-eval's own name of a metric."""
    if not isinstance(name, str) or name not in functions:
        raise InputError(f"{place}: expected as {key} of its form one of {', '.join(functions)}, found {name!r:.40}")
    return functions[name]


def _metrics(form: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """Return the metrics of a form; those that lm-eval lacks it would load from the hub, with their code."""
    metrics = form.get("metric_list")
    if not isinstance(metrics, list) or not all(
        isinstance(metric, dict) and isinstance(metric.get("metric"), str) for metric in metrics
    ):
        raise InputError(
            f"{place}: expected as metric_list of its form a list of {{metric: name}}, found {metrics!r:.80}"
        )
    if any(metric.get("hf_evaluate") for metric in metrics):
        raise InputError(f"{place}: hf_evaluate would load code from the hub; take it out of its form")
    if "process_results" in form:  # it names what it gives by itself
        return metrics
    metrics_by_name: dict[str, Any] = {**{name: name for name in lm_eval.api.registry.metric_registry}, **_METRICS}
    return [
        {**metric, "metric": _function_named(metric["metric"], "metric", metrics_by_name, place)} for metric in metrics
    ]


def _grouped(
    column: str | None, rows: Sequence[Row], examples: Sequence[Row] | None, place: str
) -> dict[str, tuple[list[Row], list[Row]]]:
    """Group questions and examples by the text in a column; without a column all of them under an empty name."""
    for row in (*rows, *(examples or ())):
        if column is not None and not isinstance(row.get(column), str):
            raise InputError(
                f"{place}: group_by of its form names {column!r}; expected a text there in every row, found "
                f"{row.get(column)!r:.20} (columns: {', '.join(row)})"
            )

    def of(kind: str, some: Sequence[Row]) -> list[Row]:
        return [row for row in some if column is None or row[column] == kind]

    kinds = sorted({row[column] for row in rows}) if column else [""]
    return {kind: (of(kind, rows), of(kind, examples or ())) for kind in kinds}


def _local_task(config: dict[str, Any], splits: Mapping[str, list[Row]], *, is_own: bool) -> ConfigurableTask:
    complete = {
        "num_fewshot": 0,
        **config,
        "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()},
        "test_split": "test",
        "fewshot_split": "test" if is_own else "examples",
    }
    try:
        return ConfigurableTask(config=complete)
    except (TemplateError, TypeError, KeyError, ValueError, SyntaxError) as error:
        columns = ", ".join(splits["test"][0])
        raise InputError(
            f"measure_accuracy.tasks {config['task']!r}: lm-eval cannot make a task of its form and columns "
            f"({columns}): {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


@functools.cache
def _hub() -> TaskManager:
    """Build lm-eval's index of its own tasks, which takes seconds."""
    return TaskManager()


def hub_tasks(name: str) -> Tasks:
    """Load a task or a group of tasks that comes with lm-eval; its questions are read from the hub or its cache.

    Raises:
        InputError: lm-eval has no such task, the hub cannot be reached, or the task runs code of a model.
    """
    if name not in _hub().all_tasks:
        near = difflib.get_close_matches(name, _hub().all_tasks, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise InputError(
            f"measure_accuracy.tasks: lm-eval has no task {name!r}{hint} (`lm-eval ls tasks` lists them); "
            "questions of your own need `path`"
        )
    try:
        loaded: Tasks = _hub().load([name])["tasks"]
    except (OSError, RuntimeError, ImportError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"measure_accuracy.tasks: the questions of {name} cannot be loaded from the hub "
            f"({type(error).__name__}: {reason}); check the network, or give `path`, a Parquet file"
        ) from error
    if any(getattr(task, "UNSAFE_CODE", False) for task in loaded.values()):
        raise InputError(f"measure_accuracy.tasks: {name} runs code of a model in this process; use human_eval")
    return loaded


def chosen_metric(tasks: Tasks, metric: str | None) -> str:
    """Choose the metric that is reported: `metric`, else acc_norm, acc or the first that is a mean.

    Raises:
        InputError: some task has no such metric, or it is no mean over questions.
    """
    means = [
        [name for name, aggregate in task.aggregation().items() if aggregate is lm_eval.api.metrics.mean]
        for task in tasks.values()
    ]
    shared = [name for name in means[0] if all(name in names for names in means)]
    preferred = (metric,) if metric else (*_DEFAULT_METRICS, *shared)
    chosen = next((name for name in preferred if name in shared), None)
    if chosen is None:
        name, task = next(iter(tasks.items()))
        raise InputError(
            f"measure_accuracy.tasks: {name} is {task.OUTPUT_TYPE} with {', '.join(task.aggregation())}; expected "
            f"{metric or 'a metric'} that is a mean over questions (has: {', '.join(shared) or 'none'}): name another "
            "metric or task"
        )
    return str(chosen)


def chosen_filter(tasks: Tasks, filter_name: str | None) -> str:
    """Choose how answers are read from texts: `filter_name`, else the task's first.

    Raises:
        InputError: there is no such filter.
    """
    names = [ensemble.name for ensemble in next(iter(tasks.values()))._filters]
    if filter_name is not None and filter_name not in names:
        raise InputError(f"measure_accuracy.tasks: {next(iter(tasks))} has no filter {filter_name!r} (has: {names})")
    return filter_name or str(names[0])


@dataclass(frozen=True)
class Asking:
    """The form that questions are asked in.

    Attributes:
        metric: metric that is counted.
        filter: how answers are read from texts.
        num_fewshot: number of examples before each question; None is the task's own number.
        limit: number of questions of each task, from the first on; None is all.
        seed: seed for the choice of examples.
        sequences_per_batch: choices or texts in one forward pass.
        chat: whether questions go through the tokenizer's chat template.
    """

    metric: str
    filter: str
    num_fewshot: int | None
    limit: int | None
    seed: int
    sequences_per_batch: int
    chat: bool


def questions_digest(tasks: Tasks, asking: Asking) -> str:
    """Return a digest of the questions that will be asked, of those that examples come from, and of tasks' versions."""
    contents = []
    for name, task in tasks.items():
        shots = task.get_config("num_fewshot") if asking.num_fewshot is None else asking.num_fewshot
        examples = task.fewshot_docs() if shots else ()
        questions = list(task.eval_docs)[: asking.limit]
        contents.append([name, str(task.VERSION), shots, _digest(questions), _digest(list(examples or ()))])
    return digest_of(contents)


def _digest(rows: Sequence[Row]) -> str:
    return digest_of(json.dumps(rows, sort_keys=True, default=str))


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, asking: Asking) -> Answers:
    """Ask a causal model of transformers the questions of `tasks`; lm-eval stores the answers in them.

    The log-likelihoods are float32, whatever the model's dtype.
    """
    for task in tasks.values():
        if asking.num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=asking.num_fewshot or 0)
        task.set_fewshot_seed(seed=asking.seed)
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=asking.sequences_per_batch,
        softmax_dtype="float32",
        trust_remote_code=False,
    )
    samples = evaluate(
        lm,
        {"tasks": tasks},
        limit=asking.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=asking.chat,
        fewshot_as_multiturn=asking.chat,
    )["samples"]
    questions, scores, chance = [], [], []
    for name, task in tasks.items():
        answered = [sample for sample in samples[name] if sample["filter"] == asking.filter]
        for sample in sorted(answered, key=lambda sample: sample["doc_id"]):
            questions.append(f"{name}/{sample['doc_id']}/{sample['doc_hash']}/{sample['prompt_hash']}")
            scores.append(float(sample[asking.metric]))
            chance.append(_chance(task, sample, asking.metric))
    return Answers(digest_of(questions), tuple(scores), tuple(chance))


def _chance(task: ConfigurableTask, sample: Row, metric: str) -> float:
    """Return a guesser's expected score of one question; 0 where there is nothing to guess from."""
    if task.OUTPUT_TYPE != "multiple_choice" or metric not in _CHOSEN:
        return 0.0
    question, right = sample["doc"], sample["target"]
    if task.config.process_results is not None and {"mc2_labels", "mc2_targets"} & question.keys():
        return statistics.fmean(_truths(question))
    return (len(right) if isinstance(right, list) else 1) / len(task.doc_to_choice(question))
