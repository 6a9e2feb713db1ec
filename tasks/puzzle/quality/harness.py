"""Runs lm-eval in this process: a task and a model in memory -> right or wrong for every question.

Only multiple choice is supported: a model's choice is the one with the highest log-likelihood (metric acc), or with the
highest log-likelihood per character (acc_norm). The module needs the extra `eval`, so it is imported only where params
name a task.
"""

import difflib
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from storage.files import InputError
from storage.tokenizer import load_tokenizer
from tasks.puzzle.model.child import DeciLMForCausalLM
from tasks.puzzle.model.device import Compute
from tasks.puzzle.quality.accuracy import PARENT, Answers, Question

NAME = f"lm-eval {version('lm-eval')}"
Tasks: TypeAlias = Mapping[str, ConfigurableTask]
"""lm-eval's tasks by name: a single task, or the members of a group, whose questions are put together."""


def _bar(*args: Any, **options: Any) -> Any:
    """Replace lm-eval's progress bar by one that is quiet where stderr is not a terminal, as our own are."""
    return tqdm(*args, **{**options, "disable": None})


lm_eval.api.model.tqdm = lm_eval.api.task.tqdm = lm_eval.models.huggingface.tqdm = _bar
# Warnings about what we do on purpose: we pass models as objects and questions as a function.
_EXPECTED_WARNINGS = ("`pretrained`", "Custom kwargs can be passed")
for _logger in ("lm_eval.models.huggingface", "lm_eval.api.task"):
    logging.getLogger(_logger).addFilter(lambda record: not any(text in record.msg for text in _EXPECTED_WARNINGS))


def local_tasks(name: str, questions: Sequence[Question]) -> Tasks:
    """Make a task of the user's own questions; the few-shot examples come from the other questions."""
    rows = [
        {"prompt": question.prompt, "choices": list(question.choices), "answer": question.answer}
        for question in questions
    ]
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics,
        "num_fewshot": 0,
    }
    return {name: ConfigurableTask(config=config)}


@functools.cache
def _hub() -> TaskManager:
    """Build lm-eval's index of its own tasks, which takes seconds."""
    return TaskManager()


def hub_tasks(name: str, metric: str) -> Tasks:
    """Load a task or a group of tasks that comes with lm-eval; its questions are read from the hub or its cache.

    Raises:
        InputError: lm-eval has no such task, the hub cannot be reached, or the task is not multiple choice or lacks the
            metric.
    """
    if name not in _hub().all_tasks:
        near = difflib.get_close_matches(name, _hub().all_tasks, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise InputError(
            f"measure_accuracy.tasks: {NAME} has no task {name!r}{hint} (`lm-eval ls tasks` lists them); "
            "questions of your own need `path`"
        )
    try:
        loaded: Tasks = _hub().load([name])["tasks"]
    except (OSError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"measure_accuracy.tasks: the questions of {name} cannot be loaded from the hub "
            f"({type(error).__name__}: {reason}); check the network, or give `path`, a Parquet file"
        ) from error
    for member, task in loaded.items():
        if task.OUTPUT_TYPE != "multiple_choice" or metric not in task.aggregation():
            raise InputError(
                f"measure_accuracy.tasks: {member} is {task.OUTPUT_TYPE} with {', '.join(task.aggregation())}; "
                f"expected multiple_choice with {metric}: name another task or metric"
            )
    return loaded


@dataclass(frozen=True)
class Asking:
    """The form that questions are asked in.

    num_fewshot: number of examples before each question; None is the task's own number.
    limit: number of questions of each task, from the first on; None is all.
    seed: seed for the choice of examples.
    sequences_per_batch: choices in one forward pass.
    """

    num_fewshot: int | None
    limit: int | None
    seed: int
    sequences_per_batch: int


def load(name: str, folder: Path, compute: Compute) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model (the parent or a child, by its `name`) and tokenizer from a checkpoint's folder, as users do."""
    disable_progress_bar()
    loader: Any = AutoModelForCausalLM if name == PARENT else DeciLMForCausalLM
    loaded = loader.from_pretrained(folder, dtype=compute.dtype, trust_remote_code=False)
    model: PreTrainedModel = loaded.to(compute.device)
    return model, load_tokenizer(folder, "dvc repro")


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, metric: str, asking: Asking
) -> Answers:
    """Ask a causal model of transformers the questions of `tasks`; lm-eval stores the answers in them.

    The log-likelihoods are float32, whatever the model's dtype.
    """
    for task in tasks.values():
        if asking.num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=asking.num_fewshot or 0)
        task.set_fewshot_seed(seed=asking.seed)
    batch = asking.sequences_per_batch
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch,
        softmax_dtype="float32",
        trust_remote_code=False,
    )
    samples = evaluate(lm, {"tasks": tasks}, limit=asking.limit, bootstrap_iters=0, log_samples=True)["samples"]
    question_ids, right, chance = [], [], []
    for name, task in tasks.items():
        for sample in sorted(samples[name], key=lambda sample: sample["doc_id"]):
            question_ids.append(f"{name}/{sample['doc_id']}/{sample['doc_hash']}/{sample['prompt_hash']}")
            right.append(float(sample[metric]))
            chance.append(1 / len(task.doc_to_choice(sample["doc"])))
    return Answers(tuple(question_ids), tuple(right), tuple(chance))
