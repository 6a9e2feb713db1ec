"""score_blocks: replace-1-block scores of every variant -> artifacts/scores.parquet.

In: the parent, the library, the corpus and the activation cache. Out: a row for each (replacement, weights, calibration
sequence), METHOD.md, Scoring. Run: `puzzle stage score_blocks`. Rows are kept under content keys in one record for each
(block, batch of sequences), so that more tokens or another variant add rows and never recompute the others. Which jobs
form a group, and so go through the parent together, is scheduling only and changes no row.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage.code_digest import code_digest
from storage.corpus import Tokens, read_sequences
from storage.files import InputError, digest_of
from storage.library import Library, channel_order_name, entry_name, whole_name
from storage.model_config import ModelConfig
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces
from storage.records import ScoreRow, Weights
from storage.tables import write_scores
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.model.head import Head, TokenLosses
from tasks.puzzle.model.initialise import Tensors
from tasks.puzzle.quality.evaluation import per_sequence
from tasks.puzzle.quality.scoring import Candidate, score_group
from tasks.puzzle.search_space import block_variants, parent_attention, parent_ffn
from tasks.tensors.activations import Activations, clear
from tasks.tensors.replacements import ReplacementWeights

REBUILD = "dvc repro score_blocks"
AROUND = "parent"


class _Subject(NamedTuple):
    """A replacement with one kind of weights; `weights_hash` is the digest of the weights, empty for no-ops."""

    replacement: Replacement
    weights: Weights
    weights_hash: str


@dataclass(frozen=True)
class ScoreJob:
    """Rows to compute: a replacement with one kind of weights on one batch of sequences; `key` is their content key."""

    replacement: Replacement
    weights: Weights
    weights_hash: str
    batch: int
    key: str

    @property
    def record(self) -> str:
        """Name of the record that holds the job's rows."""
        return f"block_{self.replacement.first_block:03d}.batch_{self.batch:04d}"


@dataclass(frozen=True)
class JobGroup:
    """Jobs of neighbouring blocks, from `first_block` on, on one batch: they go through the parent together."""

    first_block: int
    batch: int
    jobs: tuple[ScoreJob, ...]


@task(cache_policy=NO_CACHE)
def plan_groups(params: Params, paths: Paths) -> list[JobGroup]:
    """Plan the groups that are still to compute, in the parent's order; delete the records that no job has."""
    jobs = list(_jobs(params, paths))
    pieces = Pieces(paths.score_pieces, REBUILD)
    pieces.keep_only(dict.fromkeys((job.record for job in jobs), ""))
    size = params.score_blocks.blocks_per_group
    if params.cache_activations.rolling:  # a group starts at boundaries that are on disk together
        size = min(size, 1 + max((1, *params.distill_blocks.spans)))
    groups: dict[tuple[int, int], list[ScoreJob]] = {}
    for job, rows in _rows_by_job(jobs, paths).items():
        if rows is None:
            first_block = job.replacement.first_block // size * size
            groups.setdefault((first_block, job.batch), []).append(job)
    return [JobGroup(*start, tuple(members)) for start, members in sorted(groups.items())]


def _rows_by_job(jobs: list[ScoreJob], paths: Paths) -> dict[ScoreJob, list[ScoreRow] | None]:
    """Read the rows of each job from the records; None for a job that is still to compute."""
    pieces = Pieces(paths.score_pieces, REBUILD)
    finished: dict[tuple[str, str], list[ScoreRow]] = {}
    for name in pieces.names():
        for key, rows in pieces.get(name)["facts"].items():
            finished[name, key] = [ScoreRow(**row) for row in rows]
    return {job: finished.get((job.record, job.key)) for job in jobs}


def _jobs(params: Params, paths: Paths) -> Iterator[ScoreJob]:
    """Yield a job for everything that the params ask for, whether it is finished or not."""
    parent, library, settings = Parent(paths.parent), Library(paths.library), params.score_blocks
    batch_tokens = settings.sequences_per_batch * params.prepare_corpus.seq_len
    num_batches = {"decoupled": settings.tokens // batch_tokens, "initial": settings.initial_tokens // batch_tokens}
    tokens = [digest_of(_tokens(params, paths, batch).tolist()) for batch in range(num_batches["decoupled"])]
    common = {
        "parent": parent.digest,
        "run": params.run.model_dump(include={"dtype", "device", "threads"}),
        "activations": _activations(params, paths).how,
        "code": code_digest("tasks.score_blocks:score_jobs"),
    }
    for replacement, weights, weights_hash in _subjects(params, parent, library):
        for batch in range(num_batches[weights if weights_hash else "decoupled"]):
            value = {**common, "replacement": replacement.name, "weights": weights_hash, "tokens": tokens[batch]}
            yield ScoreJob(replacement, weights, weights_hash, batch, digest_of(value))


def _subjects(params: Params, parent: Parent, library: Library) -> Iterator[_Subject]:
    """Yield every replacement with one subblock changed, for each kind of weights; for a span its whole block, too."""
    settings, config = params.distill_blocks, parent.config
    attention, ffn = parent_attention(config), parent_ffn(config)
    attentions, ffns = block_variants(config, settings)
    for span in (1, *settings.spans):
        for first in range(config.num_blocks - span + 1):
            changed = [Replacement(first, span, variant, ffn) for variant in attentions if variant != attention]
            changed += [Replacement(first, span, attention, variant) for variant in ffns if variant != ffn]
            if span == 1:
                yield from _subjects_of_block(changed, parent, library)
            else:
                yield from _subjects_of_span([Replacement(first, span, attention, ffn), *changed], parent, library)


def _subjects_of_block(replacements: list[Replacement], parent: Parent, library: Library) -> Iterator[_Subject]:
    """Yield no-ops once, other replacements of a single block with trained and with initial weights."""
    for replacement in replacements:
        index, changed = replacement.first_block, _changed(replacement, parent.config)
        if changed is None or changed.kind == "no_op":
            yield _Subject(replacement, "initial", "")
            continue
        order = library.checksum(channel_order_name(index))
        yield _Subject(replacement, "decoupled", library.checksum(entry_name(index, changed)))
        initial_hash = digest_of([parent.checkpoint.block_digest(index), order, changed.name])
        yield _Subject(replacement, "initial", initial_hash)


def _subjects_of_span(replacements: list[Replacement], parent: Parent, library: Library) -> Iterator[_Subject]:
    """Yield the replacements of a span, all trained: the subblock that stays is the one of the span's whole block."""
    for replacement in replacements:
        first, span = replacement.first_block, replacement.span
        checksums, changed = [library.checksum(whole_name(first, span))], _changed(replacement, parent.config)
        if changed is not None and changed.kind != "no_op":
            checksums.append(library.checksum(entry_name(first, changed, span)))
        yield _Subject(replacement, "decoupled", digest_of(checksums))


def _changed(replacement: Replacement, config: ModelConfig) -> Attention | Ffn | None:
    """Return the variant of the subblock that is not the parent's; None where both are."""
    if replacement.attention != parent_attention(config):
        return replacement.attention
    return replacement.ffn if replacement.ffn != parent_ffn(config) else None


def _sequences(params: Params, batch: int) -> tuple[int, int]:
    """Return the index of a batch's first calibration sequence, and the index behind its last one."""
    size = params.score_blocks.sequences_per_batch
    return batch * size, (batch + 1) * size


def _tokens(params: Params, paths: Paths, batch: int) -> Tokens:
    """Read the calibration tokens of a batch, [sequences, seq_len]."""
    return read_sequences(paths.corpus, "calibration", *_sequences(params, batch))


def _activations(params: Params, paths: Paths) -> Activations:
    """Open the part of the cache that scoring reads: whole batches from the calibration split's beginning."""
    size, seq_len = params.score_blocks.sequences_per_batch, params.prepare_corpus.seq_len
    sequences = params.score_blocks.tokens // (size * seq_len) * size
    return Activations(params, paths, {"calibration": sequences}, "score_blocks")


@task(cache_policy=NO_CACHE)
def score_jobs(group: JobGroup, params: Params, paths: Paths) -> None:
    """Score the jobs of one group and add their rows to the records."""
    run, parent = params.run, Parent(paths.parent)
    compute = prepare_compute(run.device, run.dtype, run.threads)
    _, norm, lm_head = parent.outside(*compute)
    sequences, activations = range(*_sequences(params, group.batch)), _activations(params, paths)
    activations.hold(group.first_block)

    def block(index: int) -> Tensors:
        return parent.block(index, *compute)

    def boundary(index: int) -> Tensor:
        return activations.reader("calibration", index).read(sequences).to(*compute)

    weights = ReplacementWeights(parent, Library(paths.library), *compute)
    losses = score_group(
        parent.config,
        block,
        boundary,
        Head(norm, lm_head, parent.config.rms_norm_eps),
        torch.from_numpy(_tokens(params, paths, group.batch)).long().to(compute.device),
        [Candidate(job.replacement, weights.tensors(job.replacement, job.weights)) for job in group.jobs],
    )
    pieces = Pieces(paths.score_pieces, REBUILD)
    for name in sorted({job.record for job in group.jobs}):
        earlier = pieces.record(name)
        rows = {}
        for job, loss in zip(group.jobs, losses, strict=True):
            if job.record == name:
                rows[job.key] = [asdict(row) for row in _rows(job, loss, sequences)]
        pieces.finish(name, "", [], {**(earlier["facts"] if earlier else {}), **rows})


def _rows(job: ScoreJob, losses: TokenLosses, sequences: range) -> Iterator[ScoreRow]:
    """Yield a row for each sequence, with means over the sequence's tokens.

    Raises:
        InputError: a KL is not finite.
    """
    for sequence, quality in zip(sequences, per_sequence(losses), strict=True):
        if not math.isfinite(quality.kl):
            raise InputError(
                f"{job.replacement.name} ({job.weights} weights) has a KL of {quality.kl} on calibration sequence "
                f"{sequence}; it overflows in run.dtype, or its training diverged: lower distill_blocks.learning_rate"
            )
        yield ScoreRow(
            first_block=job.replacement.first_block,
            span=job.replacement.span,
            attention=job.replacement.attention.name,
            ffn=job.replacement.ffn.name,
            weights=job.weights,
            weights_hash=job.weights_hash,
            around=AROUND,
            sequence_shard=sequence,
            tokens=losses.kl.shape[1],
            kl=quality.kl,
            lm_loss=quality.lm_loss,
            top1_agreement=quality.top1_agreement,
            cosine=quality.cosine,
        )


@task(cache_policy=NO_CACHE)
def write_score_table(params: Params, paths: Paths) -> None:
    """Write scores.parquet from the records, in the order of blocks and variants; delete a window of boundaries."""
    table = []
    for job, rows in _rows_by_job(list(_jobs(params, paths)), paths).items():
        assert rows is not None, job
        table += rows
    write_scores(paths.scores, table)
    clear(paths)
