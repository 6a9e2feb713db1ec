"""distill_blocks: decoupled BLD of every variant of every block -> artifacts/library/, one piece per (block, variant).

In: the parent and the activation cache. Out: the trained tensors and an index (METHOD.md, BLD). Run:
`puzzle stage distill_blocks`. The variants of a block that are still to train do so together, in one pass over the
block's two boundaries. A span has two boundaries, too, and a whole block that is trained first and takes the place of
the parent's block.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage.checkpoints import placed
from storage.code_digest import code_digest
from storage.corpus import SplitName
from storage.files import InputError, digest_of
from storage.library import (
    FORMAT_VERSION,
    WHOLE,
    Library,
    channel_order_name,
    entry_name,
    name_of,
    refuse_unknown,
    subblock_of,
    whole_name,
)
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.distill.bld import Batch, Recipe, Trained, distill_block, distill_whole, rank_channels
from tasks.puzzle.distill.least_squares import fit_outputs
from tasks.puzzle.distill.losses import LOSSES
from tasks.puzzle.distill.optimizer import Schedule
from tasks.puzzle.model.ahead import Ahead
from tasks.puzzle.model.assembly import initial_weights
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.model.initialise import Tensors
from tasks.puzzle.search_space import block_variants, parent_attention, parent_ffn
from tasks.tensors.activations import Activations, clear
from tasks.tensors.replacements import ReplacementWeights

FIT_SEQUENCES = 8
"""Sequences at once in the closed-form start, which sums over all sequences of `fit_tokens`."""


@dataclass(frozen=True)
class BlockPlan:
    """Pieces still to make in place of `span` parent blocks: name -> content key. The channel order is a piece, too."""

    first_block: int
    span: int
    missing: dict[str, str]

    @property
    def order_name(self) -> str:
        """Return the name of the piece that ranks FFN channels."""
        return channel_order_name(self.first_block, self.span)

    @property
    def whole_name(self) -> str:
        """Return the name of the piece that holds a span's whole block."""
        return whole_name(self.first_block, self.span)


def trained_variants(params: Params, parent: Parent) -> list[Attention | Ffn]:
    """List the variants that have weights to train: all but the parent's and the no-ops."""
    config = parent.config
    attentions, ffns = block_variants(config, params.distill_blocks)
    variants: list[Attention | Ffn] = [*attentions, *ffns]
    parents = (parent_attention(config), parent_ffn(config))
    return [variant for variant in variants if variant.kind != "no_op" and variant not in parents]


_SHARED_SETTINGS = {
    *("loss", "warmup", "weight_decay", "sequences_per_step", "held_out_tokens", "check_steps", "fit_tokens"),
}
"""Settings that go into the key of every library entry; tokens and learning rate differ between variants."""


@dataclass(frozen=True)
class _Keys:
    """Content keys of the pieces that are made between two boundaries, `ends`; `inputs` goes into each of them."""

    params: Params
    activations: Activations
    ends: tuple[int, int]
    inputs: dict[str, Any]

    def reading(self, sequences: int, **more: Any) -> str:
        """Return the key of a piece that reads that many train sequences."""
        held_out = _held_out(self.params)
        read = [
            (
                self.activations.key("train", boundary, 0, sequences),
                self.activations.key("calibration", boundary, *held_out),
            )
            for boundary in self.ends
        ]
        return digest_of({**self.inputs, **more, "activations": read})

    def trained(self, name: str, kind: str, **more: Any) -> str:
        """Return the key of a variant, by its name in the library; it draws its tokens from a shuffle of `tokens`."""
        settings, seq_len = self.params.distill_blocks, self.params.prepare_corpus.seq_len
        tokens = settings.tokens_of(name)
        recipe = {"variant": name, "tokens": tokens, "shuffled": settings.tokens, "rate": settings.rate_of(kind)}
        if settings.check_steps:
            recipe["patience"] = settings.patience
        read = max(tokens, settings.tokens, settings.fit_tokens) // seq_len
        return self.reading(max(read, _ranked(self.params)), **recipe, **more)


@task(cache_policy=NO_CACHE)
def plan_blocks(params: Params, paths: Paths) -> list[BlockPlan]:
    """Plan the blocks and spans that lack pieces, in the parent's order; delete pieces that no plan has."""
    parent, library, settings = Parent(paths.parent), Library(paths.library), params.distill_blocks
    refuse_unknown(settings.variant_tokens, trained_variants(params, parent))
    common = {
        "settings": settings.model_dump(include=_SHARED_SETTINGS),
        "ranked": _ranked(params),
        "run": params.run.model_dump(exclude={"workers"}),
        "config": parent.config.to_json(),
        "code": code_digest("tasks.distill_blocks:train_block"),
        "format": FORMAT_VERSION,
    }
    activations, keys_by_range = _activations(params, paths), dict[tuple[int, int], dict[str, str]]()
    for first, span in _block_ranges(params, parent):
        blocks = [parent.checkpoint.block_digest(index) for index in range(first, first + span)]
        keys = _Keys(params, activations, (first, first + span), {**common, "blocks": blocks})
        whole = keys.trained(WHOLE, WHOLE) if span > 1 else ""
        plan = BlockPlan(first, span, {})
        keys_by_range[first, span] = {
            plan.order_name: keys.reading(_ranked(params), whole=whole),
            **({plan.whole_name: whole} if whole else {}),
            **{
                entry_name(first, variant, span): keys.trained(name_of(variant), variant.kind, whole=whole)
                for variant in trained_variants(params, parent)
            },
        }
    all_keys: dict[str, str] = {}
    for range_keys in keys_by_range.values():
        all_keys |= range_keys
    missing = set(library.pieces.keep_only(all_keys))
    plans = []
    for (first, span), range_keys in sorted(keys_by_range.items()):
        if missing_keys := {name: key for name, key in range_keys.items() if name in missing}:
            plans.append(BlockPlan(first, span, missing_keys))
    return plans


def _block_ranges(params: Params, parent: Parent) -> list[tuple[int, int]]:
    """List first block and length of all that one child block may replace: single blocks, then spans."""
    count = parent.config.num_blocks
    for span in params.distill_blocks.spans:
        if span > count:
            raise InputError(f"distill_blocks.spans has {span}, {parent.info.name} has {count} blocks; leave it out")
    ranges = []
    for span in (1, *params.distill_blocks.spans):
        ranges += [(first, span) for first in range(count - span + 1)]
    return ranges


def _train_sequences(params: Params) -> int:
    """Count the train sequences that BLD reads, from the split's beginning."""
    return params.distill_blocks.used_tokens // params.prepare_corpus.seq_len


def _ranked(params: Params) -> int:
    """Count the train sequences that rank the FFN channels."""
    return min(-(-params.distill_blocks.importance_tokens // params.prepare_corpus.seq_len), _train_sequences(params))


def _activations(params: Params, paths: Paths) -> Activations:
    """Open the part of the cache that BLD reads."""
    _, stop = _held_out(params)
    return Activations(params, paths, {"train": _train_sequences(params), "calibration": stop}, "distill_blocks")


def _held_out(params: Params) -> tuple[int, int]:
    """Return first and stop of the calibration sequences for held-out losses: the split's end; scores use its start."""
    corpus, seq_len = params.prepare_corpus, params.prepare_corpus.seq_len
    stop = corpus.calibration_tokens // seq_len
    return stop - -(-params.distill_blocks.held_out_tokens // seq_len), stop


@task(cache_policy=NO_CACHE)
def train_block(plan: BlockPlan, params: Params, paths: Paths) -> None:
    """Rank the channels of one block (of a span: train its whole block first) and train its missing variants."""
    training = _BlockTraining(plan, params, paths)
    if plan.whole_name in plan.missing:
        training.train_whole()
    block = training.base_block()
    if plan.order_name in plan.missing:
        training.rank_channels(block)
    training.train_variants(block)


class _BlockTraining:
    """Makes the missing pieces of one plan on the calling thread, from the activations at its two boundaries."""

    def __init__(self, plan: BlockPlan, params: Params, paths: Paths) -> None:
        run, self._settings, self._seq_len = params.run, params.distill_blocks, params.prepare_corpus.seq_len
        self._plan, self._params = plan, params
        self._parent, self._library = Parent(paths.parent), Library(paths.library)
        self._config, self._loss = self._parent.config, LOSSES[params.distill_blocks.loss]
        self._compute = prepare_compute(run.device, run.dtype, run.threads)
        self._first, self._behind = plan.first_block, plan.first_block + plan.span
        activations = _activations(params, paths)
        activations.hold(self._first)
        splits: tuple[SplitName, ...] = ("train", "calibration")
        self._readers = {}
        for split, boundary in itertools.product(splits, (self._first, self._behind)):
            self._readers[split, boundary] = activations.reader(split, boundary)
        sequences_per_step = self._settings.sequences_per_step
        self._steps = _groups(_shuffled(params, self._first, plan.span), sequences_per_step)
        self._held_out = _groups(list(range(*_held_out(params))), sequences_per_step)

    def train_whole(self) -> None:
        """Train the whole block that takes the place of a span's parent blocks."""
        blocks = [self._parent.block(index, *self._compute) for index in range(self._first, self._behind)]
        steps, held_out = self._batches("train", self._steps), self._batches("calibration", self._held_out)
        whole, start = distill_whole(self._config, blocks, steps, held_out, self._recipe(WHOLE, WHOLE), self._loss)
        self._finish(self._plan.whole_name, WHOLE, WHOLE, whole, start=self._first + start)

    def base_block(self) -> Tensors:
        """Read the block that the variants are derived from: the parent's, or the span's whole block."""
        attention, ffn = parent_attention(self._config), parent_ffn(self._config)
        replacement = Replacement(self._first, self._plan.span, attention, ffn)
        return ReplacementWeights(self._parent, self._library, *self._compute).tensors(replacement, "decoupled")

    def rank_channels(self, block: Tensors) -> None:
        """Rank the FFN channels of `block` and write their order."""
        name = self._plan.order_name
        groups = _groups(list(range(_ranked(self._params))), self._settings.sequences_per_step)
        order = rank_channels(self._config, block, self._inputs(groups))
        file = self._library.write(name, {"order": order})
        self._library.pieces.finish(name, self._plan.missing[name], [file])

    def train_variants(self, block: Tensors) -> None:
        """Train the missing variants of `block` and write them."""
        order = self._library.read(self._plan.order_name)["order"].to(self._compute.device)
        initial = initial_weights(self._config, block, order)
        names = {
            variant: entry_name(self._first, variant, self._plan.span)
            for variant in trained_variants(self._params, self._parent)
        }
        starts = {variant: initial(variant) for variant, name in names.items() if name in self._plan.missing}
        fit = _groups(list(range(self._settings.fit_tokens // self._seq_len)), FIT_SEQUENCES)
        trained = distill_block(
            self._config,
            block,
            starts,
            fit_outputs(self._config, block, starts, order, self._inputs(fit)) if fit else starts,
            self._batches("train", self._steps),
            self._batches("calibration", self._held_out),
            {variant: self._recipe(name_of(variant), variant.kind) for variant in starts},
            self._loss,
        )
        for variant, result in trained.items():
            self._finish(names[variant], subblock_of(variant), variant.name, result)

    def _recipe(self, name: str, kind: str) -> Recipe:
        settings = self._settings
        num_steps = settings.tokens_of(name) // (settings.sequences_per_step * self._seq_len)
        schedule = Schedule(num_steps, settings.rate_of(kind), settings.warmup, settings.weight_decay)
        return Recipe(schedule, settings.check_steps, settings.patience)

    def _hidden(self, split: SplitName, boundary: int, sequences: list[int]) -> Tensor:
        return placed(self._readers[split, boundary].read(sequences), *self._compute)

    def _inputs(self, groups: list[list[int]]) -> Iterator[Tensor]:
        """Read the train split's hidden states before the block, group by group, one ahead."""
        return Ahead((self._hidden("train", self._first, group) for group in groups), self._compute.device)

    def _batches(self, split: SplitName, groups: list[list[int]]) -> Iterator[Batch]:
        """Read the hidden states before and behind the block, group by group, one ahead."""
        boundaries = self._first, self._behind
        pairs = ((self._hidden(split, boundary, group) for boundary in boundaries) for group in groups)
        return Ahead(((before, behind) for before, behind in pairs), self._compute.device)

    def _finish(self, name: str, subblock: str, variant: str, result: Trained, **facts: int) -> None:
        """Write a trained variant and its row of the index."""
        tokens = result.steps * self._settings.sequences_per_step * self._seq_len
        row = _index_row(self._plan, subblock, variant, result, self._settings.loss, tokens)
        file = self._library.write(name, result.tensors)
        self._library.pieces.finish(name, self._plan.missing[name], [file], {**row, **facts})


def _index_row(plan: BlockPlan, subblock: str, variant: str, result: Trained, loss: str, tokens: int) -> dict[str, Any]:
    return {
        "first_block": plan.first_block,
        "span": plan.span,
        "subblock": subblock,
        "variant": variant,
        "weights": "decoupled" if result.improved else "initial",
        "loss": loss,
        "loss_before": result.loss_before,
        "loss_fitted": result.loss_fitted,
        "loss_after": result.loss_after,
        "tokens": tokens,
    }


def _shuffled(params: Params, first_block: int, span: int) -> list[int]:
    """Shuffle BLD's train sequences by a seed of this block; behind them stand those that only some variants read."""
    generator = torch.Generator().manual_seed(params.run.seed * 100_003 + first_block + 1_009 * (span - 1))
    settings, seq_len = params.distill_blocks, params.prepare_corpus.seq_len
    count = settings.tokens // seq_len
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return [*order, *range(count, settings.most_tokens // seq_len)]


def _groups(sequences: list[int], size: int) -> list[list[int]]:
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


@task(cache_policy=NO_CACHE)
def write_library_index(paths: Paths) -> None:
    """Write index.parquet, last: a library with an index is whole. Delete a window of boundaries."""
    Library(paths.library).write_index()
    clear(paths)
