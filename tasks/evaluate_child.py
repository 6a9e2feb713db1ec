"""evaluate_child: quality of parent and child, measured, and each limit: predicted beside measured.

In: children, baselines, cached hidden states; the speeds are what benchmark_throughput measured, no clock is read here.
Out: children/<target>/evaluation.json (for people and the report) and evaluation.parquet (a row per model and
sequence, for paired comparisons).
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from torch.nn import functional

from storage.activations import BoundaryReader
from storage.checkpoints import Checkpoint, read_blocks
from storage.corpus import read_sequences
from storage.files import read_json, write_json, write_whole
from storage.library import Library
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.records import Architecture, Replacement, Weights
from storage.tables import read_throughput
from storage.targets import SPEED_METRICS
from tasks.export_quality import export_quality, last_hidden
from tasks.gguf_files import GgufFile, gguf_files, whole
from tasks.measured import count, measured, speed_at, speed_ratios
from tasks.puzzle.blocks import Block
from tasks.puzzle.device import Compute, compute
from tasks.puzzle.evaluation import SequenceQuality, paired_difference, per_sequence, summarise
from tasks.puzzle.head import Head, compare_with_parent
from tasks.puzzle.rotary import rotary_for
from tasks.puzzle.variants import parent_attention
from tasks.replacements import Replacements

Qualities = dict[str, list[SequenceQuality]]
Models = dict[str, Tensor]
_MODELS = ("parent", "assembled", "distilled")


def plan_batches(params: Params) -> list[range]:
    """Validation sequences of each batch; a batch is measured on all baselines or on none."""
    settings, seq_len = params.evaluate_child, params.prepare_corpus.seq_len
    borders = [0, settings.baseline_tokens // seq_len, settings.tokens // seq_len]
    size = settings.sequences_per_batch
    return [
        range(start, min(start + size, stop))
        for first, stop in itertools.pairwise(borders)
        for start in range(first, stop, size)
    ]


@task(cache_policy=NO_CACHE)
def measure_quality(sequences: range, target: str, params: Params, paths: Paths) -> Qualities:
    """Compare children and baselines with the parent on validation sequences; its logits come from the cache."""
    run, parent = params.run, Parent(paths.parent)
    device = compute(run.device, run.dtype, run.threads)
    tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", sequences[0], sequences[-1] + 1)).long()
    reader = BoundaryReader(paths.activations, "validation", parent.config.num_blocks)
    last = reader.read(sequences).to(device.device, device.dtype)
    models: Models = {"parent": last}
    for name, folder in (("assembled", paths.assembled(target)), ("distilled", paths.distilled(target))):
        rebuild = f"dvc repro {'assemble' if name == 'assembled' else 'distill'}_child@{target}"
        models[name] = last_hidden(Checkpoint(folder, rebuild), tokens, device, len(tokens))
    if sequences[0] < params.evaluate_child.baseline_tokens // params.prepare_corpus.seq_len:
        models |= _baselines(target, tokens, device, paths)
    _, norm, lm_head = parent.outside(device.device, device.dtype)
    with torch.inference_mode():
        head = Head(norm, lm_head, parent.config.rms_norm_eps)
        losses = compare_with_parent(head, tokens.to(device.device), last, list(models.values()))
    return {name: per_sequence(one) for name, one in zip(models, losses, strict=True)}


def exported_files(target: str, params: Params, paths: Paths) -> list[GgufFile]:
    """The child's GGUF files; none where params ask for no tokens to compare on."""
    there = gguf_files(target, paths.exports(target)) if params.evaluate_child.export_tokens else {}
    return [GgufFile(target, name, path) for name, path in there.items()]


@task(cache_policy=NO_CACHE)
def measure_export(file: GgufFile, params: Params, paths: Paths) -> tuple[str, dict[str, float]]:
    """How far an exported GGUF is from the distilled child, as llama.cpp computes it.

    Raises:
        InputError: llama.cpp is not installed, a file is missing or damaged.
    """
    count = params.evaluate_child.export_tokens // params.prepare_corpus.seq_len
    tokens = torch.from_numpy(read_sequences(paths.corpus, "validation", 0, count)).long()
    child = Checkpoint(paths.distilled(file.name), f"dvc repro distill_child@{file.name}")
    return file.format, export_quality(whole(file), child, tokens, params.run)


def _baselines(target: str, tokens: Tensor, device: Compute, paths: Paths) -> Models:
    """The same for every baseline; they go through the parent together, so that each block is read once."""
    parent, library = Parent(paths.parent), Library(paths.library)
    config = parent.config
    chosen = _read_baselines(target, paths)
    embedding, _, _ = parent.outside(device.device, device.dtype)
    streams = dict.fromkeys(chosen, functional.embedding(tokens.to(device.device), embedding))
    for index in range(config.num_blocks):
        read = Replacements(parent, library, device.device, device.dtype)
        for name, (blocks, weights) in chosen.items():
            if of := next((block for block in blocks if block.first_block == index), None):  # none inside of a span
                block = Block.load(config, of.attention, of.ffn, read.tensors(of, weights))
                with torch.inference_mode():
                    streams[name] = block(streams[name], rotary_for(config, tokens.shape[1], streams[name]))
    return streams


def _read_baselines(target: str, paths: Paths) -> dict[str, tuple[tuple[Replacement, ...], Weights]]:
    """Blocks and weights of each baseline that exists under the target's limits."""
    found = read_json(paths.baselines(target), f"dvc repro search_baselines@{target}")["baselines"]
    return {
        name: (Architecture.from_json(one["blocks"]).blocks, one["weights"])
        for name, one in found.items()
        if "blocks" in one
    }


@task(cache_policy=NO_CACHE)
def write_evaluation(
    target: str,
    batches: list[Qualities],
    exports: Sequence[tuple[str, dict[str, float]]],
    params: Params,
    paths: Paths,
) -> None:
    """Join the batches and write evaluation.parquet and evaluation.json, with the quality of the exports."""
    models = {name: [one for batch in batches for one in batch.get(name, [])] for name in batches[0]}
    rows = [
        {"model": name, "sequence": index, **asdict(one)}
        for name, sequences in models.items()
        for index, one in enumerate(sequences)
    ]
    with write_whole(paths.evaluation(target).with_suffix(".parquet")) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
    chosen = read_json(paths.architecture(target), f"dvc repro search_architecture@{target}")
    parent, child = Parent(paths.parent), Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
    config, blocks = read_blocks(child)
    own = [parent_attention(parent.config)] * parent.config.num_blocks
    counted = {
        "parent": count(parent.checkpoint, parent.config, own),
        "assembled": count(child, config, [attention for attention, _ in blocks]),
    }
    timed = read_throughput(paths.throughput(target))
    constraints = [{**one, "measured": measured(one, counted, timed)} for one in chosen["constraints"]]
    speeds = (speed_at(one, timed) for one in chosen["constraints"] if one["metric"] in SPEED_METRICS)
    write_json(
        paths.evaluation(target),
        {
            "target": target,
            "label": chosen["label"],
            "tokens": params.evaluate_child.tokens,
            "sequences": len(models["parent"]),
            **{name: asdict(summarise(models[name])) for name in _MODELS},
            "baselines": {
                name: {**asdict(summarise(sequences)), "sequences": len(sequences)}
                for name, sequences in models.items()
                if name not in _MODELS
            },
            "paired": {
                name: asdict(paired_difference(sequences, models["assembled"]))
                for name, sequences in models.items()
                if name not in ("parent", "assembled")
            },
            "exports": {"tokens": params.evaluate_child.export_tokens, "formats": dict(exports)},
            "predicted": {"score": chosen["predicted"]["score"], "score_stderr": chosen["predicted"]["score_stderr"]},
            "constraints": constraints,
            "speed": next((speed for speed in speeds if speed), None),
            "speeds": list(speed_ratios(timed, counted)),
        },
    )
