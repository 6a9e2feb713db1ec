"""score_blocks: replace-1-block scores of every variant -> artifacts/scores.parquet.

In: the parent, the library, the corpus and the activation cache. Out: a row for each (replacement, weights, calibration
sequence), METHOD.md, Scoring. Run: `puzzle stage score_blocks`. Rows are kept under content keys in one record for each
(block, batch of sequences), so that more tokens or another variant add rows and never recompute the others. Which jobs
form a group, and so go through the parent together, is scheduling only and changes no row. Then whole blocks go one
after the other, for the baseline `depth`: the rows of a step are around the parent without the blocks before.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage.code_digest import code_digest
from storage.corpus import read_documents, read_sequences
from storage.documents import Tokens
from storage.fields import resolved
from storage.files import DamagedFileError, InputError, digest_of
from storage.library import Library, channel_order_name, entry_name, whole_name
from storage.model_config import ModelConfig
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces
from storage.records import ScoreRow, Weights
from storage.tables import write_scores
from storage.variants import Attention, Ffn, Replacement
from tasks.engines.machine import blocks_per_group
from tasks.puzzle.model.boundaries import embed
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.model.head import Head, TokenLosses
from tasks.puzzle.model.initialise import Tensors
from tasks.puzzle.quality.evaluation import per_sequence
from tasks.puzzle.quality.scoring import Candidate, score_group, score_removals
from tasks.puzzle.removals import MOST_REMOVED, candidates, removal, removal_order, without
from tasks.puzzle.search.score_rule import Scores
from tasks.puzzle.search_space import block_variants, parent_attention, parent_blocks, parent_ffn
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
        """Return the name of the record that holds the job's rows."""
        return f"block_{self.replacement.first_block:03d}.batch_{self.batch:04d}"


@dataclass(frozen=True)
class JobGroup:
    """Jobs of neighbouring blocks, from `first_block` on, on one batch: they go through the parent together."""

    first_block: int
    batch: int
    jobs: tuple[ScoreJob, ...]


@dataclass(frozen=True)
class RemovalBatch:
    """Rows to compute on one batch of sequences: the parent without `removed` and without each of `candidates`.

    `step` counts the blocks that are removed already; `key` is the rows' content key.
    """

    step: int
    removed: tuple[int, ...]
    candidates: tuple[int, ...]
    batch: int
    key: str

    @property
    def record(self) -> str:
        """Return the name of the record that holds the rows."""
        return _removal_record(self.step, self.batch)


def _removal_record(step: int, batch: int) -> str:
    return f"removal_{step:03d}.batch_{batch:04d}"


@task(cache_policy=NO_CACHE)
def plan_groups(params: Params, paths: Paths) -> list[JobGroup]:
    """Plan the groups that are still to compute, in the parent's order; delete the records that nothing asks for."""
    jobs = list(_jobs(params, paths))
    pieces = Pieces(paths.score_pieces, REBUILD)
    pieces.keep_only(dict.fromkeys((job.record for job in jobs), "") | _removal_keys(params, paths))
    size = blocks_per_group(params, Parent(paths.parent).config)
    groups: dict[tuple[int, int], list[ScoreJob]] = {}
    for job, rows in _rows_by_job(jobs, paths).items():
        if rows is None:
            first_block = job.replacement.first_block // size * size
            groups.setdefault((first_block, job.batch), []).append(job)
    planned = [JobGroup(*start, tuple(members)) for start, members in sorted(groups.items())]
    trained = (job.replacement for group in planned for job in group.jobs if job.weights == "decoupled")
    Library(paths.library).prefetch(trained)
    return planned


def _rows_by_job(jobs: list[ScoreJob], paths: Paths) -> dict[ScoreJob, list[ScoreRow] | None]:
    """Read the rows of each job from the records; None for a job that is still to compute."""
    pieces = Pieces(paths.score_pieces, REBUILD)
    finished: dict[tuple[str, str], list[ScoreRow]] = {}
    for name in sorted({job.record for job in jobs} & {*pieces.names()}):
        for key, rows in pieces.get(name)["facts"].items():
            finished[name, key] = [ScoreRow(**row) for row in rows]
    return {job: finished.get((job.record, job.key)) for job in jobs}


def _jobs(params: Params, paths: Paths) -> Iterator[ScoreJob]:
    """Yield a job for everything that the params ask for, whether it is finished or not."""
    parent, library, settings = Parent(paths.parent), Library(paths.library), params.score_blocks
    num_batches = {
        "decoupled": _num_batches(settings.tokens, params),
        "initial": _num_batches(settings.initial_tokens, params),
    }
    tokens = [_digest_of_batch(params, paths, batch) for batch in range(num_batches["decoupled"])]
    common = _common_key(params, paths, code_digest("tasks.score_blocks:score_jobs"))
    for replacement, weights, weights_hash in _subjects(params, parent, library):
        for batch in range(num_batches[weights if weights_hash else "decoupled"]):
            value = {**common, "replacement": replacement.name, "weights": weights_hash, "tokens": tokens[batch]}
            yield ScoreJob(replacement, weights, weights_hash, batch, digest_of(value))


def _num_batches(tokens: int, params: Params) -> int:
    """Count the batches of sequences that have so many scored tokens."""
    settings = params.score_blocks
    return tokens // (resolved(settings.sequences_per_batch) * settings.length(params.prepare_corpus.seq_len))


def _common_key(params: Params, paths: Paths, code: str) -> dict[str, Any]:
    """Return what goes into the key of all rows that the definitions behind the digest `code` compute."""
    return {
        "parent": Parent(paths.parent).digest,
        "run": params.run.model_dump(include={"dtype", "device", "threads"}),
        "activations": _activations(params, paths).how,
        "code": code,
    }


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
    size = resolved(params.score_blocks.sequences_per_batch)
    return batch * size, (batch + 1) * size


def _tokens(params: Params, paths: Paths, batch: int) -> Tokens:
    """Read the calibration tokens of a batch that are scored, [sequences, tokens]."""
    length = params.score_blocks.length(params.prepare_corpus.seq_len)
    return read_sequences(paths.corpus, "calibration", *_sequences(params, batch))[:, :length]


def _documents(params: Params, paths: Paths, batch: int) -> dict[int, int]:
    """Read the document number of each calibration sequence of a batch, by the sequence's index."""
    start, stop = _sequences(params, batch)
    documents = read_documents(paths.corpus, "calibration", start, stop).tolist()
    return dict(zip(range(start, stop), documents, strict=True))


def _digest_of_batch(params: Params, paths: Paths, batch: int) -> str:
    """Return the digest of a batch's tokens and documents."""
    return digest_of([_tokens(params, paths, batch).tolist(), [*_documents(params, paths, batch).values()]])


def _activations(params: Params, paths: Paths) -> Activations:
    """Open the part of the cache that scoring reads: whole batches from the calibration split's beginning."""
    settings = params.score_blocks
    sequences = _num_batches(settings.tokens, params) * resolved(settings.sequences_per_batch)
    return Activations(params, paths, {"calibration": sequences}, "score_blocks")


@task(cache_policy=NO_CACHE)
def score_jobs(group: JobGroup, params: Params, paths: Paths) -> None:
    """Score the jobs of one group and add their rows to the records."""
    run, parent = params.run, Parent(paths.parent)
    compute = prepare_compute(run.device, run.dtype, run.threads)
    _, norm, lm_head = parent.outside(*compute)
    sequences, activations = range(*_sequences(params, group.batch)), _activations(params, paths)
    documents = _documents(params, paths, group.batch)
    tokens = torch.from_numpy(_tokens(params, paths, group.batch)).long().to(compute.device)
    activations.hold(group.first_block)

    def block(index: int) -> Tensors:
        return parent.block(index, *compute)

    def boundary(index: int) -> Tensor:
        return activations.reader("calibration", index).read(sequences)[:, : tokens.shape[1]].to(*compute)

    weights = ReplacementWeights(parent, Library(paths.library), *compute)
    losses = score_group(
        parent.config,
        block,
        boundary,
        Head(norm, lm_head, parent.config.rms_norm_eps),
        tokens,
        [Candidate(job.replacement, weights.tensors(job.replacement, job.weights)) for job in group.jobs],
    )
    pieces = Pieces(paths.score_pieces, REBUILD)
    for name in sorted({job.record for job in group.jobs}):
        earlier = pieces.record(name)
        rows = {}
        for job, loss in zip(group.jobs, losses, strict=True):
            if job.record == name:
                rows[job.key] = [asdict(row) for row in _rows(job, AROUND, loss, documents)]
        pieces.finish(name, "", [], {**(earlier["facts"] if earlier else {}), **rows})


def _rows(
    scored: ScoreJob | _Subject, around: str, losses: TokenLosses, documents: Mapping[int, int]
) -> Iterator[ScoreRow]:
    """Yield a row for each sequence, with means over the sequence's tokens; `documents` are by sequence.

    Raises:
        InputError: a KL is not finite.
    """
    replacement = scored.replacement
    for (sequence, document), quality in zip(documents.items(), per_sequence(losses), strict=True):
        if not math.isfinite(quality.kl):
            raise InputError(
                f"{replacement.name} ({scored.weights} weights) has a KL of {quality.kl} on calibration sequence "
                f"{sequence}; it overflows in run.dtype, or its training diverged: lower distill_blocks.learning_rate"
            )
        yield ScoreRow(
            first_block=replacement.first_block,
            span=replacement.span,
            attention=replacement.attention.name,
            ffn=replacement.ffn.name,
            weights=scored.weights,
            weights_hash=scored.weights_hash,
            around=around,
            sequence_shard=sequence,
            document=document,
            tokens=losses.kl.shape[1],
            kl=quality.kl,
            lm_loss=quality.lm_loss,
            top1_agreement=quality.top1_agreement,
            cosine=quality.cosine,
        )


@task(cache_policy=NO_CACHE)
def scores_of_removals(params: Params, paths: Paths) -> dict[int, float]:
    """Return the score of removing each block alone, nats/token; nothing where no tokens are given to removals."""
    if not params.score_blocks.depth_tokens:
        return {}
    jobs = [job for job in _jobs(params, paths) if not job.weights_hash]
    rows: list[ScoreRow] = []
    for job, job_rows in _rows_by_job(jobs, paths).items():
        assert job_rows is not None, job
        rows += job_rows
    config = Parent(paths.parent).config
    scores = Scores.from_rows(rows, config)
    return {block: scores.score(removal(block), "initial").mean for block in range(config.num_blocks)}


@task(cache_policy=NO_CACHE)
def plan_removals(scores: Mapping[int, float], params: Params, paths: Paths) -> list[RemovalBatch]:
    """Plan what is missing of the next step that removes a block; nothing where all steps are finished."""
    pieces = Pieces(paths.score_pieces, REBUILD)
    for step in _removal_steps(scores, params, paths):
        if missing := [batch for batch in step if not pieces.done(batch.record, batch.key)]:
            return missing
    return []


def _removal_steps(scores: Mapping[int, float], params: Params, paths: Paths) -> Iterator[list[RemovalBatch]]:
    """Yield the batches of each step; those of a step must be finished before the next step is asked for."""
    if not scores:
        return
    pieces, blocks = Pieces(paths.score_pieces, REBUILD), parent_blocks(Parent(paths.parent).config)
    common = _common_key(params, paths, code_digest("tasks.score_blocks:score_removal"))
    num_batches = _num_batches(params.score_blocks.depth_tokens, params)
    tokens = [_digest_of_batch(params, paths, batch) for batch in range(num_batches)]
    removed: tuple[int, ...] = ()
    rows: list[ScoreRow] = []
    for step in range(_num_removed(len(blocks))):
        tried = tuple(candidates(scores, removed))
        batches = [
            RemovalBatch(step, removed, tried, batch, digest_of([common, removed, tried, read]))
            for batch, read in enumerate(tokens)
        ]
        yield batches
        for batch in batches:
            rows += [ScoreRow(**row) for row in pieces.get(batch.record)["facts"]["rows"]]
        removed = removal_order(rows, blocks)


def _num_removed(num_blocks: int) -> int:
    return int(MOST_REMOVED * num_blocks)


def _removal_keys(params: Params, paths: Paths) -> dict[str, str]:
    """Return the records of removals that may be asked for, each with the key that it has."""
    pieces, keys = Pieces(paths.score_pieces, REBUILD), dict[str, str]()
    num_batches = _num_batches(params.score_blocks.depth_tokens, params)
    for step in range(_num_removed(Parent(paths.parent).config.num_blocks)):
        for name in (_removal_record(step, batch) for batch in range(num_batches)):
            with contextlib.suppress(DamagedFileError):
                if record := pieces.record(name):
                    keys[name] = record["key"]
    return keys


@task(cache_policy=NO_CACHE)
def score_removal(batch: RemovalBatch, params: Params, paths: Paths) -> None:
    """Measure a step's removals on one batch of sequences."""
    run, parent = params.run, Parent(paths.parent)
    compute = prepare_compute(run.device, run.dtype, run.threads)
    embedding, norm, lm_head = parent.outside(*compute)
    sequences = range(*_sequences(params, batch.batch))
    tokens = torch.from_numpy(_tokens(params, paths, batch.batch)).long().to(compute.device)
    last = _activations(params, paths).reader("calibration", parent.config.num_blocks).read(sequences)
    losses = score_removals(
        parent.config,
        lambda index: parent.block(index, *compute),
        embed(embedding, tokens),
        last[:, : tokens.shape[1]].to(*compute),
        Head(norm, lm_head, parent.config.rms_norm_eps),
        tokens,
        batch.removed,
        batch.candidates,
    )
    documents = _documents(params, paths, batch.batch)
    around = without(parent_blocks(parent.config), batch.removed).digest
    rows: list[ScoreRow] = []
    for block, loss in zip(batch.candidates, losses, strict=True):
        subject = _Subject(removal(block), "initial", "")
        rows += _rows(subject, around, loss, documents)
    facts = {"rows": [asdict(row) for row in rows]}
    Pieces(paths.score_pieces, REBUILD).finish(batch.record, batch.key, [], facts)


@task(cache_policy=NO_CACHE)
def write_score_table(removals: Mapping[int, float], params: Params, paths: Paths) -> None:
    """Write scores.parquet from the records, in the order of blocks and variants; delete a window of boundaries.

    `removals` are the scores of removing each block alone, as :func:`scores_of_removals` gives them.
    """
    table = []
    for job, rows in _rows_by_job(list(_jobs(params, paths)), paths).items():
        assert rows is not None, job
        table += rows
    pieces = Pieces(paths.score_pieces, REBUILD)
    for step in _removal_steps(removals, params, paths):
        for batch in step:
            table += [ScoreRow(**row) for row in pieces.get(batch.record)["facts"]["rows"]]
    write_scores(paths.scores, table)
    clear(paths)
