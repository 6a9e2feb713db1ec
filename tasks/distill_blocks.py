"""distill_blocks: decoupled BLD of every variant of every block -> artifacts/library/, a (block, variant) a piece.

Variants of a block that are still to train do so together, from one pass over the block's two boundaries.
"""

from dataclasses import dataclass

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage.activations import BoundaryReader
from storage.files import digest_of
from storage.library import FORMAT_VERSION, Library, channel_order_name, entry_name, subblock_of
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import code_digest
from storage.records import Attention, Ffn
from tasks.puzzle.assembly import initial_weights
from tasks.puzzle.bld import Batch, distill_block, rank_channels
from tasks.puzzle.device import compute
from tasks.puzzle.least_squares import fit_outputs
from tasks.puzzle.optimizer import Schedule
from tasks.puzzle.variants import attention_variants, ffn_variants, parent_attention, parent_ffn

FIT_SEQUENCES = 8
"""Sequences at once in the closed-form start; the sums are over all of them."""


@dataclass(frozen=True)
class BlockPlan:
    """What is still to make of one block: piece name -> key; the channel order is a piece of its own."""

    block_index: int
    channel_order_key: str
    order_missing: bool
    variants: dict[str, str]


def trained_variants(params: Params, parent: Parent) -> list[Attention | Ffn]:
    """Variants with weights of their own: all but the parent's and the no-ops."""
    settings, config = params.distill_blocks, parent.config
    everything: list[Attention | Ffn] = [
        *attention_variants(config, settings.linear),
        *ffn_variants(config, settings.ffn_ratios, settings.width_multiple, settings.linear),
    ]
    kept = (parent_attention(config), parent_ffn(config))
    return [variant for variant in everything if variant.kind != "no_op" and variant not in kept]


@task(cache_policy=NO_CACHE)
def plan_blocks(params: Params, paths: Paths) -> list[BlockPlan]:
    """Blocks with something to make; finished entries stay, strangers are deleted."""
    parent, library, settings = Parent(paths.parent), Library(paths.library), params.distill_blocks
    seq_len = params.prepare_corpus.seq_len
    train = max(settings.tokens, settings.fit_tokens) // seq_len
    held_start, held_stop = _held_out(params)
    own = settings.model_dump(exclude={"ffn_ratios", "width_multiple", "linear"})
    common = {
        "settings": own,
        "run": params.run.model_dump(exclude={"workers"}),
        "config": parent.config.to_json(),
        "code": code_digest("tasks.distill_blocks"),
        "format": FORMAT_VERSION,
    }
    orders: dict[int, str] = {}
    entries: dict[int, dict[str, str]] = {}
    for index in range(parent.config.num_blocks):
        data = [
            BoundaryReader(paths.activations, split, boundary).digest(start, stop)
            for boundary in (index, index + 1)
            for split, start, stop in (("train", 0, train), ("calibration", held_start, held_stop))
        ]
        inputs = {**common, "activations": data, "block": parent.checkpoint.block_digest(index)}
        orders[index] = digest_of(inputs)
        entries[index] = {
            entry_name(index, variant): digest_of({**inputs, "variant": variant.name})
            for variant in trained_variants(params, parent)
        }
    order_names = {channel_order_name(index): key for index, key in orders.items()}
    wanted = {name: key for names in entries.values() for name, key in names.items()}
    missing = set(library.pieces.keep_only({**order_names, **wanted}))
    plans = [
        BlockPlan(
            index,
            orders[index],
            channel_order_name(index) in missing,
            {name: key for name, key in entries[index].items() if name in missing},
        )
        for index in orders
    ]
    return [plan for plan in plans if plan.order_missing or plan.variants]


def _held_out(params: Params) -> tuple[int, int]:
    """Calibration sequences for the losses before and after: the split's end; scores take its beginning."""
    seq_len, corpus = params.prepare_corpus.seq_len, params.prepare_corpus
    stop = corpus.calibration_tokens // seq_len
    return stop - -(-params.distill_blocks.held_out_tokens // seq_len), stop


@task(cache_policy=NO_CACHE)
def train_block(plan: BlockPlan, params: Params, paths: Paths) -> None:
    """Rank the channels of one block and train its missing variants."""
    run, settings, parent, library = params.run, params.distill_blocks, Parent(paths.parent), Library(paths.library)
    device = compute(run.device, run.dtype, run.threads)
    index, config, seq_len = plan.block_index, parent.config, params.prepare_corpus.seq_len
    block = parent.block(index, device.device, device.dtype)
    data = {
        (split, at): BoundaryReader(paths.activations, split, at)
        for split in ("train", "calibration")
        for at in (index, index + 1)
    }

    def hidden(split: str, boundary: int, sequences: list[int]) -> Tensor:
        return data[split, boundary].read(sequences).to(device.device, device.dtype)

    def batch(split: str, sequences: list[int]) -> Batch:
        return hidden(split, index, sequences), hidden(split, index + 1, sequences)

    order_name = channel_order_name(index)
    if plan.order_missing:
        ranked = range(min(-(-settings.importance_tokens // seq_len), settings.tokens // seq_len))
        groups = _groups(list(ranked), settings.sequences_per_step)
        order = rank_channels(config, block, (hidden("train", index, group) for group in groups))
        file = library.write(order_name, {"order": order})
        library.pieces.finish(order_name, plan.channel_order_key, [file])
    order = library.read(order_name)["order"].to(device.device)
    by_name = {entry_name(index, variant): variant for variant in trained_variants(params, parent)}
    initial = initial_weights(config, block, order)
    starts = {by_name[name]: initial(by_name[name]) for name in plan.variants}
    fit = _groups(list(range(settings.fit_tokens // seq_len)), FIT_SEQUENCES)
    inputs = (hidden("train", index, group) for group in fit)
    steps = _groups(_shuffled(params, index), settings.sequences_per_step)
    trained = distill_block(
        config,
        block,
        starts,
        fit_outputs(config, block, starts, order, inputs) if fit else starts,
        (batch("train", group) for group in steps),
        (
            batch("calibration", group)
            for group in _groups(list(range(*_held_out(params))), settings.sequences_per_step)
        ),
        Schedule(len(steps), settings.learning_rate, settings.warmup, settings.weight_decay),
    )
    for name, key in plan.variants.items():
        variant, result = by_name[name], trained[by_name[name]]
        facts = {
            "first_block": index,
            "span": 1,
            "subblock": subblock_of(variant),
            "variant": variant.name,
            "weights": "decoupled" if result.improved else "initial",
            "loss_before": result.loss_before,
            "loss_fitted": result.loss_fitted,
            "loss_after": result.loss_after,
            "tokens": len(steps) * settings.sequences_per_step * seq_len,
        }
        library.pieces.finish(name, key, [library.write(name, result.tensors)], facts)


def _shuffled(params: Params, block_index: int) -> list[int]:
    """Train sequences of BLD in a seeded order of the block's own."""
    generator = torch.Generator().manual_seed(params.run.seed * 100_003 + block_index)
    count = params.distill_blocks.tokens // params.prepare_corpus.seq_len
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _groups(sequences: list[int], size: int) -> list[list[int]]:
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


@task(cache_policy=NO_CACHE)
def write_library_index(paths: Paths) -> None:
    """Write index.parquet, last: a library with an index is whole."""
    Library(paths.library).write_index()
