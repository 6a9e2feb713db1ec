"""score_blocks: replace-1-block scores of every variant -> artifacts/scores.parquet.

A row is (replacement, weights, sequence). Rows are kept under keys of content in one record for each (block, batch of
sequences), so more tokens or another variant add rows and never recompute the others. The *group* (neighbouring blocks
on one batch) that goes through the parent together is scheduling only.

Where params let tokens adapt (tasks/puzzle/stopping.py), batches are scored in turn. A block or span takes part in no
further one when all of its replacements are settled, so that they are compared on the same sequences; a variant that is
beaten takes part in none and has no row in the table, so that no search can choose it for an easy beginning.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage.corpus import Tokens, read_sequences
from storage.files import InputError, digest_of
from storage.library import Library, channel_order_name, entry_name, whole_name
from storage.model_config import ModelConfig
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces, code_digest
from storage.records import Attention, Component, Ffn, Replacement, ScoreRow, Weights
from storage.sections import ScoreBlocks
from storage.tables import write_scores
from tasks.activations import Activations, clear
from tasks.puzzle.device import compute
from tasks.puzzle.evaluation import per_sequence
from tasks.puzzle.head import Head, TokenLosses
from tasks.puzzle.initialise import Tensors
from tasks.puzzle.scoring import Candidate, score_group
from tasks.puzzle.stopping import Contender, is_dominated, is_settled
from tasks.puzzle.variants import (
    attention_variants,
    component_sizes,
    ffn_variants,
    parent_attention,
    parent_ffn,
)
from tasks.replacements import Replacements

REBUILD = "dvc repro score_blocks"
AROUND = "parent"
_Candidate = tuple[Replacement, Weights]


@dataclass(frozen=True)
class Job:
    """Rows to compute: a replacement with some weights on one batch of sequences, under their content key."""

    replacement: Replacement
    weights: Weights
    weights_hash: str
    batch: int
    key: str

    @property
    def candidate(self) -> _Candidate:
        """What is scored."""
        return self.replacement, self.weights

    @property
    def record(self) -> str:
        """Name of the record that holds its rows."""
        return f"block_{self.replacement.first_block:03d}.batch_{self.batch:04d}"


@dataclass(frozen=True)
class Group:
    """Jobs of neighbouring blocks, from `first_block` on, on one batch: they go through the parent together."""

    first_block: int
    batch: int
    jobs: tuple[Job, ...]


@task(cache_policy=NO_CACHE)
def plan_groups(params: Params, paths: Paths) -> list[Group]:
    """Groups to compute next, in the parent's order, none when the table is complete; strangers are deleted.

    Where tokens adapt, these are of one batch: what it tells decides who takes part in the one behind it.
    """
    jobs = list(_jobs(params, paths))
    pieces = Pieces(paths.score_pieces, REBUILD)
    pieces.keep_only(dict.fromkeys((job.record for job in jobs), ""))
    size = params.score_blocks.blocks_per_group
    if params.cache_activations.rolling:  # a group starts at boundaries that are on disk together
        size = min(size, 1 + max((1, *params.distill_blocks.spans)))
    groups: dict[tuple[int, int], list[Job]] = {}
    for job, rows in _wanted(jobs, params, paths):
        if rows is None:
            place = job.replacement.first_block // size * size, job.batch
            groups.setdefault(place, []).append(job)
    return [Group(*place, tuple(members)) for place, members in sorted(groups.items())]


def _wanted(jobs: list[Job], params: Params, paths: Paths) -> list[tuple[Job, list[ScoreRow] | None]]:
    """Jobs that take part and their rows, None where they are still to compute, up to the first batch that decides."""
    pieces, settings = Pieces(paths.score_pieces, REBUILD), params.score_blocks
    found = {
        (name, key): [ScoreRow(**row) for row in rows]
        for name in pieces.names()
        for key, rows in pieces.get(name)["facts"].items()
    }
    told = {job: found.get((job.record, job.key)) for job in jobs}
    if not settings.adapts:
        return list(told.items())
    race, wanted = _Race(Parent(paths.parent).config, settings), set()
    for batch in sorted({job.batch for job in jobs}):
        running = [job for job in jobs if job.batch == batch and job.candidate not in race.stopped]
        wanted.update(running)
        if any(told[job] is None for job in running):
            break
        race.go_on({job.candidate: told[job] or [] for job in running})
    return [(job, rows) for job, rows in told.items() if job in wanted and job.candidate not in race.beaten]


class _Race:
    """Replacements batch after batch: which are beaten, and which take part no longer."""

    def __init__(self, config: ModelConfig, settings: ScoreBlocks) -> None:
        self._config, self._settings = config, settings
        self._kl: dict[_Candidate, tuple[float, ...]] = {}
        self.beaten: set[_Candidate] = set()
        self.stopped: set[_Candidate] = set()

    def go_on(self, rows: Mapping[_Candidate, Sequence[ScoreRow]]) -> None:
        """Take the rows of a batch, and see who need not go on."""
        for of, new in rows.items():
            self._kl[of] = (*self._kl.get(of, ()), *(row.kl for row in new))
        self.beaten |= self._dominated() if self._settings.drop_dominated else set()
        places: dict[tuple[int, int, bool], list[_Candidate]] = {}
        for of in self._kl.keys() - self.beaten:
            places.setdefault((of[0].first_block, of[0].span, self._may_be_chosen(of)), []).append(of)
        for members in places.values():
            if all(is_settled(self._kl[of], self._settings.relative_error) for of in members):
                self.stopped.update(members)
        self.stopped |= self.beaten

    def _may_be_chosen(self, of: _Candidate) -> bool:
        """A child gets trained variants, and no-ops."""
        replacement, weights = of
        changed = _changed(replacement, self._config)
        return weights == "decoupled" or (changed is not None and changed.kind == "no_op")

    def _dominated(self) -> set[_Candidate]:
        rivals: dict[tuple[int, int, Component], dict[_Candidate, Contender]] = {}
        for of in filter(self._may_be_chosen, self._kl):
            replacement, changed = of[0], _changed(of[0], self._config)
            if changed is not None:
                component: Component = "attention" if isinstance(changed, Attention) else "ffn"
                sizes = component_sizes(self._config, component, changed.name, "bfloat16")
                place = replacement.first_block, replacement.span, component
                contender = Contender(sizes.params, sizes.kv_bytes_per_token, self._kl[of])
                rivals.setdefault(place, {})[of] = contender
        return {of for group in rivals.values() for of, one in group.items() if is_dominated(one, group.values())}


def _jobs(params: Params, paths: Paths) -> Iterator[Job]:
    """All rows that the params ask for."""
    parent, library, settings = Parent(paths.parent), Library(paths.library), params.score_blocks
    batch_tokens = settings.sequences_per_batch * params.prepare_corpus.seq_len
    num_batches = {"decoupled": settings.tokens // batch_tokens, "initial": settings.initial_tokens // batch_tokens}
    tokens = [digest_of(_tokens(params, paths, batch).tolist()) for batch in range(num_batches["decoupled"])]
    common = {
        "parent": parent.digest,
        "run": params.run.model_dump(include={"dtype", "device", "threads"}),
        "activations": _activations(params, paths).how,
        "code": code_digest("tasks.score_blocks", "tasks.replacements", "tasks.activations"),
    }
    for replacement, weights, weights_hash in _candidates(params, parent, library):
        for batch in range(num_batches[weights if weights_hash else "decoupled"]):
            value = {**common, "replacement": replacement.name, "weights": weights_hash, "tokens": tokens[batch]}
            yield Job(replacement, weights, weights_hash, batch, digest_of(value))


def _candidates(params: Params, parent: Parent, library: Library) -> Iterator[tuple[Replacement, Weights, str]]:
    """Every replacement with one subblock changed, its weights and their hash; of a span the whole block as well."""
    settings, config = params.distill_blocks, parent.config
    attention, ffn = parent_attention(config), parent_ffn(config)
    attentions = attention_variants(config, settings.linear)
    ffns = ffn_variants(config, settings.ffn_ratios, settings.width_multiple, settings.linear)
    for span in (1, *settings.spans):
        for first in range(config.num_blocks - span + 1):
            halves = [Replacement(first, span, other, ffn) for other in attentions if other != attention]
            halves += [Replacement(first, span, attention, other) for other in ffns if other != ffn]
            if span == 1:
                yield from _of_block(halves, parent, library)
            else:
                yield from _of_span([Replacement(first, span, attention, ffn), *halves], parent, library)


def _of_block(
    halves: list[Replacement], parent: Parent, library: Library
) -> Iterator[tuple[Replacement, Weights, str]]:
    """No-ops once, others trained and initial."""
    for replacement in halves:
        index, changed = replacement.first_block, _changed(replacement, parent.config)
        if changed is None or changed.kind == "no_op":
            yield replacement, "initial", ""
            continue
        order = library.checksum(channel_order_name(index))
        yield replacement, "decoupled", library.checksum(entry_name(index, changed))
        yield replacement, "initial", digest_of([parent.checkpoint.block_digest(index), order, changed.name])


def _of_span(of: list[Replacement], parent: Parent, library: Library) -> Iterator[tuple[Replacement, Weights, str]]:
    """All trained: the subblock that stays is the span's own."""
    for replacement in of:
        first, span = replacement.first_block, replacement.span
        own, changed = [library.checksum(whole_name(first, span))], _changed(replacement, parent.config)
        if changed is not None and changed.kind != "no_op":
            own.append(library.checksum(entry_name(first, changed, span)))
        yield replacement, "decoupled", digest_of(own)


def _changed(replacement: Replacement, config: ModelConfig) -> Attention | Ffn | None:
    """The subblock that is not of the parent's kind."""
    if replacement.attention != parent_attention(config):
        return replacement.attention
    return replacement.ffn if replacement.ffn != parent_ffn(config) else None


def _sequences(params: Params, batch: int) -> tuple[int, int]:
    """First and behind the last calibration sequence of a batch."""
    size = params.score_blocks.sequences_per_batch
    return batch * size, (batch + 1) * size


def _tokens(params: Params, paths: Paths, batch: int) -> Tokens:
    """Calibration tokens of a batch, [sequences, seq_len]."""
    return read_sequences(paths.corpus, "calibration", *_sequences(params, batch))


def _activations(params: Params, paths: Paths) -> Activations:
    """What scoring reads of the cache: batches from the calibration split's beginning."""
    size, seq_len = params.score_blocks.sequences_per_batch, params.prepare_corpus.seq_len
    sequences = params.score_blocks.tokens // (size * seq_len) * size
    return Activations(params, paths, {"calibration": sequences}, "score_blocks")


@task(cache_policy=NO_CACHE)
def score_jobs(group: Group, params: Params, paths: Paths) -> None:
    """Score one group and add its rows to the records."""
    run, parent = params.run, Parent(paths.parent)
    device = compute(run.device, run.dtype, run.threads)
    _, norm, lm_head = parent.outside(device.device, device.dtype)
    sequences, activations = range(*_sequences(params, group.batch)), _activations(params, paths)
    activations.hold(group.first_block)

    def block(index: int) -> Tensors:
        return parent.block(index, device.device, device.dtype)

    def boundary(index: int) -> Tensor:
        return activations.reader("calibration", index).read(sequences).to(device.device, device.dtype)

    read = Replacements(parent, Library(paths.library), device.device, device.dtype)
    losses = score_group(
        parent.config,
        block,
        boundary,
        Head(norm, lm_head, parent.config.rms_norm_eps),
        torch.from_numpy(_tokens(params, paths, group.batch)).long().to(device.device),
        [Candidate(job.replacement, read.tensors(job.replacement, job.weights)) for job in group.jobs],
    )
    pieces = Pieces(paths.score_pieces, REBUILD)
    for name in sorted({job.record for job in group.jobs}):
        earlier = pieces.record(name)
        rows = {
            job.key: [asdict(row) for row in _rows(job, loss, sequences)]
            for job, loss in zip(group.jobs, losses, strict=True)
            if job.record == name
        }
        pieces.finish(name, "", [], {**(earlier["facts"] if earlier else {}), **rows})


def _rows(job: Job, losses: TokenLosses, sequences: range) -> Iterator[ScoreRow]:
    """A row per sequence: means over its positions.

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
    """Write scores.parquet from the records, in the order of blocks and variants. A window of boundaries goes."""
    table = []
    for job, rows in _wanted(list(_jobs(params, paths)), params, paths):
        assert rows is not None, job
        table += rows
    write_scores(paths.scores, table)
    clear(paths)
