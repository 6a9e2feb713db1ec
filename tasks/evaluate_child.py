"""evaluate_child: measured quality of parent and child, and the predicted and the measured value of every limit.

In: children, baselines, cached hidden states, and the speeds that benchmark_throughput measured (this stage reads no
clock). Out: children/<target>/evaluation.json (for people and the report) and evaluation.parquet (a row per model and
sequence, for paired comparisons). Run: `puzzle stage evaluate_child --target TARGET`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from torch.nn import functional

from storage.activations import BoundaryReader
from storage.architecture import read_architecture, read_baselines
from storage.checkpoints import Checkpoint, read_blocks
from storage.corpus import read_sequences
from storage.evaluation import BaselineQuality, Evaluation, ExportQuality, Exports, MeasuredLimit, PredictedScore
from storage.evaluation import write_evaluation as write_evaluation_json
from storage.library import Library
from storage.params import Params
from storage.parent import Parent
from storage.parquet_files import write_table
from storage.paths import Paths
from storage.tables import read_throughput
from storage.variants import Replacement
from tasks.checkpoints.export_quality import export_quality, last_hidden
from tasks.checkpoints.gguf_files import GgufFile, gguf_files, whole
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import Compute, prepare_compute
from tasks.puzzle.model.head import Head, compare_with_parent
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.quality.evaluation import SequenceQuality, paired_difference, per_sequence, summarise
from tasks.puzzle.search_space import parent_attention
from tasks.targets.measured import Counted, count, measured_speed, measured_value, speed_ratios
from tasks.tensors.replacements import ReplacementWeights

Qualities = dict[str, list[SequenceQuality]]
"""Quality of every sequence of a batch, by name of the model."""
Streams = dict[str, Tensor]
"""Hidden states of a batch, [sequences, tokens, hidden], by name of the model."""
_MODELS = ("parent", "assembled", "distilled")
"""The models that are no baselines."""


def plan_batches(params: Params) -> list[range]:
    """Validation sequences of each batch; a batch is measured on all baselines or on none."""
    settings, seq_len = params.evaluate_child, params.prepare_corpus.seq_len
    with_baselines, total = settings.baseline_tokens // seq_len, settings.tokens // seq_len
    size = settings.sequences_per_batch
    batches = []
    for first, stop in ((0, with_baselines), (with_baselines, total)):
        batches += [range(start, min(start + size, stop)) for start in range(first, stop, size)]
    return batches


@task(cache_policy=NO_CACHE)
def measure_quality(sequences: range, target: str, params: Params, paths: Paths) -> Qualities:
    """Compare children and baselines with the parent on validation sequences.

    The parent's logits are computed from its cached last hidden states.
    """
    run, parent = params.run, Parent(paths.parent)
    compute = prepare_compute(run.device, run.dtype, run.threads)
    tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", sequences[0], sequences[-1] + 1)).long()
    reader = BoundaryReader(paths.activations, "validation", parent.config.num_blocks)
    last = reader.read(sequences).to(*compute)
    models: Streams = {"parent": last}
    for name, folder in (("assembled", paths.assembled(target)), ("distilled", paths.distilled(target))):
        rebuild = f"dvc repro {'assemble' if name == 'assembled' else 'distill'}_child@{target}"
        models[name] = last_hidden(Checkpoint(folder, rebuild), tokens, compute, len(tokens))
    if sequences[0] < params.evaluate_child.baseline_tokens // params.prepare_corpus.seq_len:
        models |= _baselines(target, tokens, compute, paths)
    _, norm, lm_head = parent.outside(*compute)
    with torch.inference_mode():
        head = Head(norm, lm_head, parent.config.rms_norm_eps)
        losses = compare_with_parent(head, tokens.to(compute.device), last, list(models.values()))
    return {name: per_sequence(token_losses) for name, token_losses in zip(models, losses, strict=True)}


def exported_files(target: str, params: Params, paths: Paths) -> list[GgufFile]:
    """The child's GGUF files; none where params ask for no tokens to compare on."""
    files = gguf_files(target, paths.exports(target)) if params.evaluate_child.export_tokens else {}
    return [GgufFile(target, export_format, path) for export_format, path in files.items()]


@task(cache_policy=NO_CACHE)
def measure_export(file: GgufFile, params: Params, paths: Paths) -> tuple[str, ExportQuality]:
    """Measure how far an exported GGUF is from the distilled child, as llama.cpp computes it.

    Returns:
        The file's format and its quality.

    Raises:
        InputError: llama.cpp is not installed, a file is missing or damaged.
    """
    sequences = params.evaluate_child.export_tokens // params.prepare_corpus.seq_len
    tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", 0, sequences)).long()
    child = Checkpoint(paths.distilled(file.name), f"dvc repro distill_child@{file.name}")
    return file.format, export_quality(whole(file), child, tokens, params.run)


def _baselines(target: str, tokens: Tensor, compute: Compute, paths: Paths) -> Streams:
    """Last hidden states of every baseline that exists under the target's limits.

    All of them go through the parent's blocks together, so that each block is read once.
    """
    parent, library = Parent(paths.parent), Library(paths.library)
    config = parent.config
    baselines = {name: choice for name, choice in read_baselines(target, paths).items() if choice.blocks}
    embedding, _, _ = parent.outside(*compute)
    streams = dict.fromkeys(baselines, functional.embedding(tokens.to(compute.device), embedding))
    for index in range(config.num_blocks):
        weights = ReplacementWeights(parent, library, *compute)
        for name, baseline in baselines.items():
            replacement = _starting_at(index, baseline.blocks or ())
            if replacement is None:  # the index is inside a span
                continue
            tensors = weights.tensors(replacement, baseline.weights)
            block = Block.load(config, replacement.attention, replacement.ffn, tensors)
            with torch.inference_mode():
                streams[name] = block(streams[name], rotary_for(config, tokens.shape[1], streams[name]))
    return streams


def _starting_at(block_index: int, blocks: Sequence[Replacement]) -> Replacement | None:
    return next((block for block in blocks if block.first_block == block_index), None)


@task(cache_policy=NO_CACHE)
def write_evaluation(
    target: str,
    batches: list[Qualities],
    exports: Sequence[tuple[str, ExportQuality]],
    params: Params,
    paths: Paths,
) -> None:
    """Join the batches and write evaluation.parquet and evaluation.json, with the quality of the exports."""
    models = {}
    for name in batches[0]:
        models[name] = list(itertools.chain.from_iterable(batch.get(name, []) for batch in batches))
    _write_sequences(models, paths.evaluation(target).with_suffix(".parquet"))
    chosen = read_architecture(target, paths)
    timed = read_throughput(paths.throughput(target))
    counted = _count(target, paths)
    speeds = [measured_speed(limit, timed) for limit in chosen.constraints if limit.is_speed]
    evaluation = Evaluation(
        target=target,
        label=chosen.label,
        tokens=params.evaluate_child.tokens,
        sequences=len(models["parent"]),
        parent=summarise(models["parent"]),
        assembled=summarise(models["assembled"]),
        distilled=summarise(models["distilled"]),
        baselines={name: _baseline_quality(models[name]) for name in models if name not in _MODELS},
        paired={
            name: paired_difference(sequences, models["assembled"])
            for name, sequences in models.items()
            if name not in ("parent", "assembled")
        },
        exports=Exports(params.evaluate_child.export_tokens, dict(exports)),
        predicted=PredictedScore(chosen.predicted.score, chosen.predicted.score_stderr),
        constraints=tuple(
            MeasuredLimit.from_limit(limit, measured_value(limit, counted, timed)) for limit in chosen.constraints
        ),
        speed=next((speed for speed in speeds if speed), None),
        speeds=tuple(speed_ratios(timed, counted)),
    )
    write_evaluation_json(paths.evaluation(target), evaluation)


def _write_sequences(models: Qualities, path: Path) -> None:
    """Write evaluation.parquet, a row for each model and sequence."""
    rows = [
        {"model": name, "sequence": index, **asdict(quality)}
        for name, sequences in models.items()
        for index, quality in enumerate(sequences)
    ]
    write_table(path, pa.Table.from_pylist(rows))


def _count(target: str, paths: Paths) -> dict[str, Counted]:
    """Sizes of parent and assembled child, counted on their tensors."""
    parent, child = Parent(paths.parent), Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
    config, blocks = read_blocks(child)
    attention = [parent_attention(parent.config)] * parent.config.num_blocks
    return {
        "parent": count(parent.checkpoint, parent.config, attention),
        "assembled": count(child, config, [variant for variant, _ in blocks]),
    }


def _baseline_quality(sequences: Sequence[SequenceQuality]) -> BaselineQuality:
    return BaselineQuality(**asdict(summarise(sequences)), sequences=len(sequences))
