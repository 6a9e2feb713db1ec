"""measure_accuracy: how much of the parent's accuracy its children keep, on benchmarks that params name.

In: the parent, the children of a target that exist (assembled, refined, distilled), questions from files or the hub.
Out: children/<target>/accuracy.json, which has no benchmark if params name none. Answers are kept in artifacts/answers.
Run: `puzzle stage measure_accuracy --target like-51b`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.accuracy import Accuracy, BenchmarkAccuracy, PositionBucket, write_accuracy
from storage.accuracy_sections import PositionLoss
from storage.code_digest import code_digest
from storage.files import InputError, digest_of
from storage.params import Params
from storage.parent_info import read_parent_info
from storage.paths import Paths
from tasks.accuracy.human_eval import planned_human_eval
from tasks.accuracy.long_documents import LongDocuments, long_documents
from tasks.accuracy.models import AskedModel, PlannedBenchmark, asked_models, parent_model, remembered
from tasks.accuracy.mt_bench import planned_mt_bench
from tasks.accuracy.questions import planned_task
from tasks.drawing.accuracy_text import accuracy_text
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.quality.accuracy import Answers, combine, compare
from tasks.puzzle.quality.position_loss import compare_positions, ranges, summed_losses


@task(cache_policy=NO_CACHE)
def plan_benchmarks(params: Params, paths: Paths) -> list[PlannedBenchmark]:
    """Check everything that params name: what is wrong stops the stage before a model loads.

    Raises:
        InputError: a benchmark cannot be asked, or long documents cannot be read.
    """
    settings, seed = params.measure_accuracy, params.run.seed
    for name, writing in (("human_eval", settings.human_eval), ("mt_bench", settings.mt_bench)):
        if writing and writing.max_tokens >= (context := _context(paths)):
            raise InputError(
                f"measure_accuracy.{name}.max_tokens is {writing.max_tokens}, which leaves no room for a prompt in the "
                f"parent's context of {context}; lower it"
            )
    planned = [planned_task(accuracy_task, seed, settings.sequences_per_batch) for accuracy_task in settings.tasks]
    if settings.human_eval:
        planned.append(planned_human_eval(settings.human_eval, seed, settings.sequences_per_batch))
    if settings.mt_bench:
        planned.append(planned_mt_bench(settings.mt_bench, seed, paths))
    if any(benchmark.chat for benchmark in planned):
        parent_model(paths).tokenizer(chat=True)
    if settings.position_loss:
        _long_documents(settings.position_loss, paths)
    return planned


def _context(paths: Paths) -> int:
    return read_parent_info(paths.parent).config.context


def _long_documents(settings: PositionLoss, paths: Paths) -> LongDocuments:
    return long_documents(settings, parent_model(paths).tokenizer(chat=False), _context(paths), paths)


@task(cache_policy=NO_CACHE)
def measure(planned: PlannedBenchmark, target: str, params: Params, paths: Paths) -> BenchmarkAccuracy:
    """Ask the parent and the children of `target` one benchmark; memory holds one model at a time."""
    compute = _compute(params)
    answers = {model.name: _answers(planned, model, compute, params, paths) for model in asked_models(target, paths)}
    return compare(planned.benchmark, answers)


def _answers(planned: PlannedBenchmark, model: AskedModel, compute: Compute, params: Params, paths: Paths) -> Answers:
    of_model = _model_key(model, compute, params)

    def keep(part: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        return remembered(paths, {**part, **of_model}, make)

    def ask() -> dict[str, Any]:
        return asdict(planned.ask(*model.load(compute, chat=planned.chat), keep))

    answers = keep(planned.key, ask)
    return Answers(answers["questions_digest"], tuple(answers["scores"]), tuple(answers["chance"]))


def _compute(params: Params) -> Compute:
    return prepare_compute(params.run.device, params.run.dtype, params.run.threads)


def _model_key(model: AskedModel, compute: Compute, params: Params) -> dict[str, Any]:
    """Return a key of the model, and of what its numbers depend on wherever it computes."""
    code = code_digest("tasks.accuracy.models:AskedModel")
    computed = [str(compute.device), str(compute.dtype), params.run.threads, code]
    return {"model": model.digest, "compute": computed}


@task(cache_policy=NO_CACHE)
def measure_positions(settings: PositionLoss, target: str, params: Params, paths: Paths) -> tuple[PositionBucket, ...]:
    """Measure the log-loss of the parent and the children of `target` by position; one model is in memory at a time."""
    compute, documents = _compute(params), _long_documents(settings, paths)
    losses = {model.name: _losses(documents, model, compute, params, paths) for model in asked_models(target, paths)}
    return compare_positions(losses, [len(ids) for ids in documents.tokens], documents.numbers)


def _losses(
    documents: LongDocuments, model: AskedModel, compute: Compute, params: Params, paths: Paths
) -> list[list[float]]:
    """Sum a model's losses, for each document over each range of positions."""
    parts = ranges(max(len(ids) for ids in documents.tokens))

    def measured() -> dict[str, list[list[float]]]:
        loaded, _ = model.load(compute, chat=False)
        with torch.inference_mode():
            tensors = [torch.tensor([ids], device=compute.device) for ids in documents.tokens]
            return {"losses": [summed_losses(loaded, ids, parts) for ids in tensors]}

    code = code_digest("tasks.measure_accuracy:_losses")
    key = {"documents": digest_of(documents.tokens), "code": code, **_model_key(model, compute, params)}
    losses: list[list[float]] = remembered(paths, key, measured)["losses"]
    return losses


@task(cache_policy=NO_CACHE)
def write_measured(
    target: str,
    benchmarks: Sequence[BenchmarkAccuracy],
    positions: tuple[PositionBucket, ...],
    params: Params,
    paths: Paths,
) -> str:
    """Write accuracy.json. Returns a table for people."""
    accuracy = Accuracy(target, params.run.dtype, tuple(benchmarks), combine(benchmarks), positions)
    write_accuracy(paths.accuracy(target), accuracy)
    return accuracy_text(accuracy)
