"""evaluate_child: measured quality of parent and child, and the predicted and the measured value of every limit.

In: children, baselines, the corpus and the parent's cached hidden states, and the speeds that benchmark_throughput
measured (this stage reads no clock). Out: children/<target>/evaluation.json (for people and the report) and
evaluation.parquet (a row per domain, model and sequence, for paired comparisons). Quality is measured on held-out text
of every domain of the corpus: of the training's own, `validation`, and of those that no stage trains on.
Run: `puzzle stage evaluate_child --target TARGET`.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage.activations import BoundaryReader
from storage.architecture import read_architecture, read_baselines
from storage.checkpoints import Checkpoint, read_blocks
from storage.corpus import SPLITS, Manifest, domain_split, read_documents, read_manifest, read_sequences
from storage.documents import TRAINING_MIX
from storage.evaluation import (
    CHILD_STATES,
    BaselineQuality,
    DomainQuality,
    Evaluation,
    Exports,
    MeasuredLimit,
    ModelName,
    PredictedScore,
)
from storage.evaluation import write_evaluation as write_evaluation_json
from storage.fields import resolved
from storage.formats import FormatName
from storage.library import Library
from storage.params import Params
from storage.parent import Parent
from storage.parquet_files import write_table
from storage.paths import Paths
from storage.records import Weights
from storage.tables import read_throughput
from storage.variants import Replacement
from tasks.checkpoints.export_quality import ExportedSequences, compare_files, export_quality, last_hidden
from tasks.checkpoints.gguf_files import exported_ggufs
from tasks.puzzle.model.boundaries import advance, embed
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.model.head import Head, compare_with_parent
from tasks.puzzle.quality.evaluation import SequenceQuality, paired_difference, per_sequence, summarise
from tasks.puzzle.search_space import parent_attention, parent_blocks
from tasks.targets.measured import Counted, count, measured_speed, measured_value, speed_ratios
from tasks.tensors.replacements import ReplacementWeights

Qualities = dict[str, list[SequenceQuality]]
"""Quality of every sequence, by name of the model."""
Streams = dict[str, Tensor]
"""Hidden states of a batch, [sequences, tokens, hidden], by name of the model."""
_MODELS: tuple[ModelName, ...] = ("parent", *CHILD_STATES)
"""The models that are no baselines."""
_EXPORT_BATCH = 2
"""Sequences that exported files are compared on at once."""


@dataclass(frozen=True)
class Batch:
    """Held-out sequences of a domain that go through all models together, through baselines as well or not."""

    domain: str
    sequences: range
    has_baselines: bool


@dataclass(frozen=True)
class MeasuredBatch:
    """The document and the qualities of each sequence of a domain's batch."""

    domain: str
    documents: list[int]
    qualities: Qualities


@dataclass(frozen=True)
class _Composed:
    """A model made of parts of parent and library, without a checkpoint of its own."""

    blocks: Sequence[Replacement]
    weights: Weights


def plan_batches(params: Params, paths: Paths) -> list[Batch]:
    """Plan the sequences of each batch, domain by domain; a batch is measured on all baselines or on none.

    A domain that no stage trains on is taken whole where it has fewer tokens than params ask for.
    """
    settings, manifest = params.evaluate_child, read_manifest(paths.corpus)
    batches, at_once = [], resolved(settings.sequences_per_batch)
    for domain, split in _splits(manifest).items():
        total, with_baselines = settings.tokens // manifest.seq_len, settings.baseline_tokens // manifest.seq_len
        if domain != TRAINING_MIX:
            total = min(total, manifest.splits[split].sequences)
            with_baselines = min(settings.domain_baseline_tokens // manifest.seq_len, total)
        for first, stop in ((0, with_baselines), (with_baselines, total)):
            for start in range(first, stop, at_once):
                sequences = range(start, min(start + at_once, stop))
                batches.append(Batch(domain, sequences, has_baselines=stop == with_baselines))
    return batches


def _splits(manifest: Manifest) -> dict[str, str]:
    """Map each domain to its held-out split, the training's own first."""
    others = {split.removeprefix(domain_split("")): split for split in manifest.splits if split not in SPLITS}
    return {TRAINING_MIX: "validation", **others}


@task(cache_policy=NO_CACHE)
def measure_quality(batch: Batch, target: str, params: Params, paths: Paths) -> MeasuredBatch:
    """Compare children and baselines with the parent on a batch of held-out sequences.

    The parent's logits are computed from its last hidden states, which are cached on the training's own domain only.
    """
    run, parent = params.run, Parent(paths.parent)
    compute = prepare_compute(run.device, run.dtype, run.threads)
    split = _splits(read_manifest(paths.corpus))[batch.domain]
    first, stop = batch.sequences.start, batch.sequences.stop
    tokens = torch.from_numpy(read_sequences(paths.corpus, split, first, stop)).long()
    composed = _baselines(target, paths) if batch.has_baselines else {}
    models: Streams = {}
    if batch.domain == TRAINING_MIX:
        reader = BoundaryReader(paths.activations, "validation", parent.config.num_blocks)
        models["parent"] = reader.read(batch.sequences).to(*compute)
    else:
        composed = {"parent": _Composed(parent_blocks(parent.config), "decoupled"), **composed}
    models |= _last_states(composed, tokens, compute, paths)
    for name, checkpoint in _checkpoints(target, paths).items():
        models[name] = last_hidden(checkpoint, tokens, compute, len(tokens))
    _, norm, lm_head = parent.outside(*compute)
    with torch.inference_mode():
        head = Head(norm, lm_head, parent.config.rms_norm_eps)
        losses = compare_with_parent(head, tokens.to(compute.device), models["parent"], list(models.values()))
    qualities = {name: per_sequence(token_losses) for name, token_losses in zip(models, losses, strict=True)}
    return MeasuredBatch(batch.domain, read_documents(paths.corpus, split, first, stop).tolist(), qualities)


def _checkpoints(target: str, paths: Paths) -> dict[str, Checkpoint]:
    """Return the child's checkpoints, in the order in which they were made."""
    return {
        "assembled": Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}"),
        "refined": Checkpoint(paths.refined(target), f"dvc repro refine_child@{target}"),
        "distilled": Checkpoint(paths.distilled(target), f"dvc repro distill_child@{target}"),
    }


def _baselines(target: str, paths: Paths) -> dict[str, _Composed]:
    """Return every baseline that exists under the target's limits."""
    return {
        name: _Composed(baseline.blocks, baseline.weights)
        for name, baseline in read_baselines(target, paths).items()
        if baseline.blocks
    }


def _last_states(models: Mapping[str, _Composed], tokens: Tensor, compute: Compute, paths: Paths) -> Streams:
    """Compute hidden states before the final norm; all models go through the parent's blocks, each read once."""
    parent, library = Parent(paths.parent), Library(paths.library)
    config = parent.config
    embedding, _, _ = parent.outside(*compute)
    streams = dict.fromkeys(models, embed(embedding, tokens))
    for index in range(config.num_blocks):
        weights = ReplacementWeights(parent, library, *compute)
        for name, model in models.items():
            replacement = _starting_at(index, model.blocks)
            if replacement is None:  # the index is inside a span
                continue
            tensors = weights.tensors(replacement, model.weights)
            block = replacement.attention, replacement.ffn, tensors
            streams[name] = advance(config, block, streams[name], len(tokens))
    return streams


def _starting_at(block_index: int, blocks: Sequence[Replacement]) -> Replacement | None:
    return next((block for block in blocks if block.first_block == block_index), None)


def exported_files(target: str, params: Params, paths: Paths) -> dict[FormatName, Path]:
    """Return the child's GGUF files by format, whole; none where params ask for no tokens to compare on.

    Raises:
        InputError: a file that was exported is missing.
        DamagedFileError: one is not as it was exported.
    """
    return exported_ggufs(target, paths.exports(target)) if params.evaluate_child.export_tokens else {}


def plan_exports(files: Mapping[FormatName, Path], params: Params) -> list[range]:
    """Plan the validation sequences of each batch that exported files are compared on; none without files."""
    total = params.evaluate_child.export_tokens // params.prepare_corpus.seq_len if files else 0
    return [range(start, min(start + _EXPORT_BATCH, total)) for start in range(0, total, _EXPORT_BATCH)]


@task(cache_policy=NO_CACHE)
def measure_exports(
    sequences: range, files: Mapping[FormatName, Path], target: str, params: Params, paths: Paths
) -> ExportedSequences:
    """Measure how far the exported GGUFs are from the distilled child, as llama.cpp computes them.

    Raises:
        InputError: llama.cpp is not installed, or it does not load a file.
    """
    tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", sequences.start, sequences.stop)).long()
    return compare_files(files, _checkpoints(target, paths)["distilled"], tokens, params.run)


@task(cache_policy=NO_CACHE)
def write_evaluation(
    target: str,
    batches: Sequence[MeasuredBatch],
    exported: Sequence[ExportedSequences],
    params: Params,
    paths: Paths,
) -> None:
    """Join the batches and write evaluation.parquet and evaluation.json, with the quality of the exports."""
    domains = dict.fromkeys(batch.domain for batch in batches)
    joined = {domain: _joined(domain, batches) for domain in domains}
    _write_sequences(joined.values(), paths.evaluation(target).with_suffix(".parquet"))
    chosen = read_architecture(target, paths)
    timed = read_throughput(paths.throughput(target))
    counted = _count(target, paths)
    speeds = [measured_speed(limit, timed) for limit in chosen.constraints if limit.is_speed]
    evaluation = Evaluation(
        target=target,
        label=chosen.label,
        domains={domain: _domain_quality(measured, params) for domain, measured in joined.items()},
        exports=_exports(exported, joined[TRAINING_MIX].documents, params),
        predicted=PredictedScore(chosen.predicted.score, chosen.predicted.score_stderr),
        constraints=tuple(
            MeasuredLimit.from_limit(limit, measured_value(limit, counted, timed)) for limit in chosen.constraints
        ),
        speed=next((speed for speed in speeds if speed), None),
        speeds=tuple(speed_ratios(timed, counted)),
    )
    write_evaluation_json(paths.evaluation(target), evaluation)


def _joined(domain: str, batches: Sequence[MeasuredBatch]) -> MeasuredBatch:
    """Join the sequences of a domain, in order; baselines have the first ones only."""
    parts = [batch for batch in batches if batch.domain == domain]
    qualities: Qualities = {}
    for name in (*_MODELS, *(name for name in parts[0].qualities if name not in _MODELS)):
        qualities[name] = list(itertools.chain.from_iterable(part.qualities.get(name, ()) for part in parts))
    documents = list(itertools.chain.from_iterable(part.documents for part in parts))
    return MeasuredBatch(domain, documents, qualities)


def _domain_quality(measured: MeasuredBatch, params: Params) -> DomainQuality:
    models, documents = measured.qualities, measured.documents
    parent, assembled, refined, distilled = (summarise(models[name], documents) for name in _MODELS)
    return DomainQuality(
        tokens=len(documents) * params.prepare_corpus.seq_len,
        sequences=len(documents),
        documents=len(set(documents)),
        parent=parent,
        assembled=assembled,
        refined=refined,
        distilled=distilled,
        baselines={name: _baseline_quality(models[name], documents) for name in models if name not in _MODELS},
        paired={
            name: paired_difference(sequences, models["assembled"], documents)
            for name, sequences in models.items()
            if name not in ("parent", "assembled")
        },
    )


def _baseline_quality(sequences: Sequence[SequenceQuality], documents: Sequence[int]) -> BaselineQuality:
    measured_documents = documents[: len(sequences)]
    return BaselineQuality(
        **asdict(summarise(sequences, measured_documents)),
        sequences=len(measured_documents),
        documents=len(set(measured_documents)),
    )


def _exports(exported: Sequence[ExportedSequences], documents: Sequence[int], params: Params) -> Exports:
    """Average the quality of each exported file; `documents` has those of the domain that files were compared on."""
    compared_documents = documents[: sum(len(part.in_torch) for part in exported)]
    formats = {
        name: export_quality(name, exported, compared_documents) for name in (exported[0].files if exported else ())
    }
    return Exports(len(compared_documents) * params.prepare_corpus.seq_len, len(set(compared_documents)), formats)


def _write_sequences(domains: Iterable[MeasuredBatch], path: Path) -> None:
    """Write evaluation.parquet, a row for each domain, model and sequence."""
    rows = []
    for measured in domains:
        for name, sequences in measured.qualities.items():
            for index, (document, quality) in enumerate(zip(measured.documents, sequences, strict=False)):
                place = {"domain": measured.domain, "model": name, "sequence": index, "document": document}
                rows.append({**place, **asdict(quality)})
    write_table(path, pa.Table.from_pylist(rows))


def _count(target: str, paths: Paths) -> dict[str, Counted]:
    """Count the sizes of parent and assembled child on their tensors."""
    parent, child = Parent(paths.parent), Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
    config, blocks = read_blocks(child)
    attention = [parent_attention(parent.config)] * parent.config.num_blocks
    return {
        "parent": count(parent.checkpoint, parent.config, attention),
        "assembled": count(child, config, [variant for variant, _ in blocks]),
    }
