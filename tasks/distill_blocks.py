"""distill_blocks: decoupled BLD of every variant of every block -> artifacts/library/, a (block, variant) a piece.

Variants of a block that are still to train do so together, from one pass over the block's two boundaries. A span has
two boundaries as well, and a whole block of its own that is trained first and takes the parent's place.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

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
from storage.pieces import code_digest
from storage.records import Attention, Ffn, Replacement
from tasks.activations import Activations, clear
from tasks.puzzle.assembly import initial_weights
from tasks.puzzle.bld import Batch, Recipe, Trained, distill_block, distill_whole, rank_channels
from tasks.puzzle.device import compute
from tasks.puzzle.least_squares import fit_outputs
from tasks.puzzle.losses import LOSSES
from tasks.puzzle.optimizer import Schedule
from tasks.puzzle.variants import attention_variants, ffn_variants, parent_attention, parent_ffn
from tasks.replacements import Replacements

FIT_SEQUENCES = 8
"""Sequences at once in the closed-form start; the sums are over all of them."""


@dataclass(frozen=True)
class BlockPlan:
    """What is still to make in place of `span` parent blocks: piece name -> key. The channel order is a piece too."""

    first_block: int
    span: int
    missing: dict[str, str]

    @property
    def order_name(self) -> str:
        """The piece that ranks FFN channels."""
        return channel_order_name(self.first_block, self.span)

    @property
    def whole_name(self) -> str:
        """The piece that takes the parent's place in a span."""
        return whole_name(self.first_block, self.span)


def trained_variants(params: Params, parent: Parent) -> list[Attention | Ffn]:
    """Variants with weights of their own: all but the parent's and the no-ops."""
    settings, config = params.distill_blocks, parent.config
    everything: list[Attention | Ffn] = [
        *attention_variants(config, settings.linear),
        *ffn_variants(config, settings.ffn_ratios, settings.width_multiple, settings.linear),
    ]
    kept = (parent_attention(config), parent_ffn(config))
    return [variant for variant in everything if variant.kind != "no_op" and variant not in kept]


_OF_ALL_VARIANTS = {
    *("loss", "warmup", "weight_decay", "sequences_per_step", "held_out_tokens", "check_steps", "fit_tokens"),
}
"""Settings that go into every entry of the library; tokens and learning rate are a variant's own."""


@dataclass(frozen=True)
class _Keys:
    """Content keys of what is made between two boundaries, `ends`; `inputs` is what goes into all of it."""

    params: Params
    activations: Activations
    ends: tuple[int, int]
    inputs: dict[str, Any]

    def of(self, sequences: int, **more: Any) -> str:
        """What reads so many train sequences."""
        held_out = _held_out(self.params)
        read = [
            (self.activations.key("train", at, 0, sequences), self.activations.key("calibration", at, *held_out))
            for at in self.ends
        ]
        return digest_of({**self.inputs, **more, "activations": read})

    def trained(self, name: str, kind: str, **more: Any) -> str:
        """A variant, by its name in the library: it draws its tokens from a shuffle of `tokens`."""
        settings, seq_len = self.params.distill_blocks, self.params.prepare_corpus.seq_len
        tokens = settings.tokens_of(name)
        recipe = {"variant": name, "tokens": tokens, "shuffled": settings.tokens, "rate": settings.rate_of(kind)}
        if settings.check_steps:
            recipe["patience"] = settings.patience
        read = max(tokens, settings.tokens, settings.fit_tokens) // seq_len
        return self.of(max(read, _ranked(self.params)), **recipe, **more)


@task(cache_policy=NO_CACHE)
def plan_blocks(params: Params, paths: Paths) -> list[BlockPlan]:
    """Blocks and spans with something to make, in the parent's order; finished entries stay, strangers are deleted."""
    parent, library, settings = Parent(paths.parent), Library(paths.library), params.distill_blocks
    refuse_unknown(settings.variant_tokens, trained_variants(params, parent))
    common = {
        "settings": settings.model_dump(include=_OF_ALL_VARIANTS),
        "ranked": _ranked(params),
        "run": params.run.model_dump(exclude={"workers"}),
        "config": parent.config.to_json(),
        "code": code_digest("tasks.distill_blocks", "tasks.replacements", "tasks.activations"),
        "format": FORMAT_VERSION,
    }
    activations, wanted = _activations(params, paths), dict[tuple[int, int], dict[str, str]]()
    for first, span in _places(params, parent):
        blocks = [parent.checkpoint.block_digest(index) for index in range(first, first + span)]
        keys = _Keys(params, activations, (first, first + span), {**common, "blocks": blocks})
        whole = keys.trained(WHOLE, WHOLE) if span > 1 else ""
        plan = BlockPlan(first, span, {})
        wanted[first, span] = {
            plan.order_name: keys.of(_ranked(params), whole=whole),
            **({plan.whole_name: whole} if whole else {}),
            **{
                entry_name(first, variant, span): keys.trained(name_of(variant), variant.kind, whole=whole)
                for variant in trained_variants(params, parent)
            },
        }
    missing = set(library.pieces.keep_only({name: key for of in wanted.values() for name, key in of.items()}))
    plans = [
        BlockPlan(first, span, {name: key for name, key in of.items() if name in missing})
        for (first, span), of in sorted(wanted.items())
    ]
    return [plan for plan in plans if plan.missing]


def _places(params: Params, parent: Parent) -> list[tuple[int, int]]:
    """First block and length of everything that one child block may stand for: single blocks, then spans."""
    count = parent.config.num_blocks
    for span in params.distill_blocks.spans:
        if span > count:
            raise InputError(f"distill_blocks.spans has {span}, {parent.info['name']} has {count} blocks; leave it out")
    return [(first, span) for span in (1, *params.distill_blocks.spans) for first in range(count - span + 1)]


def _train_sequences(params: Params) -> int:
    """Train sequences that BLD reads, from the split's beginning."""
    return params.distill_blocks.used_tokens // params.prepare_corpus.seq_len


def _ranked(params: Params) -> int:
    """Train sequences that rank the FFN channels."""
    return min(-(-params.distill_blocks.importance_tokens // params.prepare_corpus.seq_len), _train_sequences(params))


def _activations(params: Params, paths: Paths) -> Activations:
    """What BLD reads of the cache."""
    _, stop = _held_out(params)
    return Activations(params, paths, {"train": _train_sequences(params), "calibration": stop}, "distill_blocks")


def _held_out(params: Params) -> tuple[int, int]:
    """Calibration sequences for the losses before and after: the split's end; scores take its beginning."""
    seq_len, corpus = params.prepare_corpus.seq_len, params.prepare_corpus
    stop = corpus.calibration_tokens // seq_len
    return stop - -(-params.distill_blocks.held_out_tokens // seq_len), stop


@task(cache_policy=NO_CACHE)
def train_block(plan: BlockPlan, params: Params, paths: Paths) -> None:
    """Rank the channels of one block (of a span: train its whole block first) and train its missing variants."""
    run, settings, parent, library = params.run, params.distill_blocks, Parent(paths.parent), Library(paths.library)
    device = compute(run.device, run.dtype, run.threads)
    first, span, config, seq_len = plan.first_block, plan.span, parent.config, params.prepare_corpus.seq_len
    activations, loss = _activations(params, paths), LOSSES[settings.loss]
    activations.hold(first)
    splits: tuple[SplitName, ...] = ("train", "calibration")
    data = {(split, at): activations.reader(split, at) for split in splits for at in (first, first + span)}
    steps = _groups(_shuffled(params, first, span), settings.sequences_per_step)
    held_out = _groups(list(range(*_held_out(params))), settings.sequences_per_step)

    def recipe(name: str, kind: str) -> Recipe:
        count = settings.tokens_of(name) // (settings.sequences_per_step * seq_len)
        schedule = Schedule(count, settings.rate_of(kind), settings.warmup, settings.weight_decay)
        return Recipe(schedule, settings.check_steps, settings.patience)

    def hidden(split: SplitName, boundary: int, sequences: list[int]) -> Tensor:
        return data[split, boundary].read(sequences).to(device.device, device.dtype)

    def batches(split: SplitName, groups: list[list[int]]) -> Iterator[Batch]:
        return ((hidden(split, first, group), hidden(split, first + span, group)) for group in groups)

    def finish(name: str, subblock: str, variant: str, result: Trained, **facts: int) -> None:
        tokens = result.steps * settings.sequences_per_step * seq_len
        row = _index_row(plan, subblock, variant, result, settings.loss, tokens)
        library.pieces.finish(name, plan.missing[name], [library.write(name, result.tensors)], {**row, **facts})

    if plan.whole_name in plan.missing:
        blocks = [parent.block(index, device.device, device.dtype) for index in range(first, first + span)]
        whole, start = distill_whole(
            config, blocks, batches("train", steps), batches("calibration", held_out), recipe(WHOLE, WHOLE), loss
        )
        finish(plan.whole_name, WHOLE, WHOLE, whole, start=first + start)
    own = Replacement(first, span, parent_attention(config), parent_ffn(config))
    block = Replacements(parent, library, device.device, device.dtype).tensors(own, "decoupled")
    if plan.order_name in plan.missing:
        groups = _groups(list(range(_ranked(params))), settings.sequences_per_step)
        order = rank_channels(config, block, (hidden("train", first, group) for group in groups))
        file = library.write(plan.order_name, {"order": order})
        library.pieces.finish(plan.order_name, plan.missing[plan.order_name], [file])
    order = library.read(plan.order_name)["order"].to(device.device)
    initial = initial_weights(config, block, order)
    names = {variant: entry_name(first, variant, span) for variant in trained_variants(params, parent)}
    starts = {variant: initial(variant) for variant, name in names.items() if name in plan.missing}
    fit = _groups(list(range(settings.fit_tokens // seq_len)), FIT_SEQUENCES)
    inputs = (hidden("train", first, group) for group in fit)
    trained = distill_block(
        config,
        block,
        starts,
        fit_outputs(config, block, starts, order, inputs) if fit else starts,
        batches("train", steps),
        batches("calibration", held_out),
        {variant: recipe(name_of(variant), variant.kind) for variant in starts},
        loss,
    )
    for variant, result in trained.items():
        finish(names[variant], subblock_of(variant), variant.name, result)


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
    """Train sequences of BLD in a seeded order of the block's own; behind them those that only some variants take."""
    generator = torch.Generator().manual_seed(params.run.seed * 100_003 + first_block + 1_009 * (span - 1))
    settings, seq_len = params.distill_blocks, params.prepare_corpus.seq_len
    count = settings.tokens // seq_len
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return [*order, *range(count, settings.most_tokens // seq_len)]


def _groups(sequences: list[int], size: int) -> list[list[int]]:
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


@task(cache_policy=NO_CACHE)
def write_library_index(paths: Paths) -> None:
    """Write index.parquet, last: a library with an index is whole. A window of boundaries goes."""
    Library(paths.library).write_index()
    clear(paths)
