"""lm-eval in this process: a task and a model in memory -> right or wrong for every question.

Only multiple choice: lm-eval takes the choice with the highest log-likelihood (acc), or with the highest one per
character (acc_norm). Needs the extra `eval`, so it is imported only where a task was asked for.
"""

import difflib
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from storage.files import InputError
from tasks.puzzle.accuracy import PARENT, Answers, Question
from tasks.puzzle.child import DeciLMForCausalLM
from tasks.puzzle.device import Compute

NAME = f"lm-eval {version('lm-eval')}"
Tasks = Mapping[str, Any]
"""lm-eval's tasks by name: one, or those of a group, whose questions are put together."""


def _bar(*args: Any, **options: Any) -> Any:
    """lm-eval's progress, quiet where stderr is no terminal, as our own."""
    return tqdm(*args, **{**options, "disable": None})


lm_eval.api.model.tqdm = lm_eval.api.task.tqdm = lm_eval.models.huggingface.tqdm = _bar
# What we do on purpose: models passed as objects, questions passed as a function.
_EXPECTED_WARNINGS = ("`pretrained`", "Custom kwargs can be passed")
for _logger in ("lm_eval.models.huggingface", "lm_eval.api.task"):
    logging.getLogger(_logger).addFilter(lambda record: not any(text in record.msg for text in _EXPECTED_WARNINGS))


def local_tasks(name: str, questions: Sequence[Question]) -> Tasks:
    """A task over questions of one's own; examples (few-shot) come from the other questions."""
    rows = [{"prompt": one.prompt, "choices": list(one.choices), "answer": one.answer} for one in questions]
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
    """lm-eval's index of its own tasks; building it takes seconds."""
    return TaskManager()


def hub_tasks(name: str, metric: str) -> Tasks:
    """A task or group of lm-eval's own, its questions read from the Hugging Face hub (or its cache).

    Raises:
        InputError: lm-eval knows no such task, the hub cannot be reached, or it has not multiple choice or the metric.
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
    for one, task in loaded.items():
        if task.OUTPUT_TYPE != "multiple_choice" or metric not in task.aggregation():
            raise InputError(
                f"measure_accuracy.tasks: {one} is {task.OUTPUT_TYPE} with {', '.join(task.aggregation())}; "
                f"expected multiple_choice with {metric}: name another task or metric"
            )
    return loaded


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    num_fewshot: examples before each question, None is the task's own number; limit: the first so many questions of
    each task, None is all; seed: of the choice of examples; sequences_per_batch: choices in one forward pass.
    """

    num_fewshot: int | None
    limit: int | None
    seed: int
    sequences_per_batch: int


def load(name: str, folder: Path, device: Compute) -> tuple[Any, Any]:
    """Model (the parent or a child) and tokenizer of a checkpoint's folder, as users load them."""
    disable_progress_bar()
    loader: Any = AutoModelForCausalLM if name == PARENT else DeciLMForCausalLM
    model = loader.from_pretrained(folder, dtype=device.dtype)
    return model.to(device.device), AutoTokenizer.from_pretrained(folder)


def answer(model: Any, tokenizer: Any, tasks: Tasks, metric: str, asking: Asking) -> Answers:
    """Ask a causal model of transformers the questions of `tasks`, which keep what they were answered.

    The log-likelihoods are float32, whatever the model computes in.
    """
    for task in tasks.values():
        if asking.num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=asking.num_fewshot or 0)
        task.set_fewshot_seed(seed=asking.seed)
    batch = asking.sequences_per_batch
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, softmax_dtype="float32")
    samples = evaluate(lm, {"tasks": tasks}, limit=asking.limit, bootstrap_iters=0, log_samples=True)["samples"]
    asked, right, chance = [], [], []
    for name, task in tasks.items():
        for sample in sorted(samples[name], key=lambda one: one["doc_id"]):
            asked.append(f"{name}/{sample['doc_id']}/{sample['doc_hash']}/{sample['prompt_hash']}")
            right.append(float(sample[metric]))
            chance.append(1 / len(task.doc_to_choice(sample["doc"])))
    return Answers(tuple(asked), tuple(right), tuple(chance))
