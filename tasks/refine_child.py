"""refine_child: the assembled child + cached activations -> children/<target>/refined/ and refine.json.

The child is walked through once, block by block, and each subblock is corrected in closed form on the child's own
hidden states (tasks/puzzle/distill/correction.py). A block waits for the one before it; its sequences, and the ridges
that are tried, are computed side by side and added up in their order, so that the bytes do not depend on the number of
workers. Memory holds one block and a few sequences: the child's states before the block are on disk, and the parent's
come from the activation cache, which may be a rolling one. Leading blocks that are the parent's stay as they are. The
ridges are chosen on the end of the calibration split, as BLD's held-out losses are; scores use its start. Run:
`puzzle stage refine_child --target like-51b`.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from statistics import fmean
from typing import TypeVar

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from storage.checkpoints import Checkpoint
from storage.code_digest import code_digest
from storage.corpus import SplitName
from storage.files import digest_of, write_whole
from storage.json_records import as_record
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces
from storage.refinement import BlockRefinement, Refinement, SubblockName, SubblockRefinement, write_refinement
from storage.variants import Replacement
from tasks.checkpoints.children import architecture_for, publish
from tasks.puzzle.distill.correction import (
    Moments,
    ParentStates,
    correct,
    corrected_subblocks,
    moments,
    relative_error,
)
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import prepare_compute
from tasks.puzzle.model.initialise import Tensors
from tasks.puzzle.model.rotary import rotary_for
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tasks.tensors.activations import Activations, clear
from tasks.tensors.child_states import ChildStates

T = TypeVar("T")
_GROUP = 4
"""Sequences whose sums are formed at once: one product of 1,024 tokens costs less than four of 256, and fewer calls."""
_STREAMS: dict[str, SplitName] = {"train": "train", "calibration": "calibration", "assembled": "calibration"}
"""Streams of states through the child and the splits that they begin with; `assembled` goes through the child as it
was, to show the error along depth without the correction."""


@task(cache_policy=NO_CACHE)
def refine(target: str, params: Params, paths: Paths) -> None:
    """Correct the child of `target` and publish it.

    Raises:
        InputError: the child was assembled for another parent.
    """
    parent, settings = Parent(paths.parent), params.refine_child
    chosen = architecture_for(parent, target, paths)
    correction = _ChildCorrection(target, chosen.blocks, params, paths)
    blocks = correction.run() if settings.tokens else ()
    sentence, max_shard_gib = _training(settings.tokens, blocks), params.assemble_child.max_shard_gib
    publish(paths.refined(target), chosen, parent, correction.tensors(), sentence, max_shard_gib)
    write_refinement(paths.refinement(target), Refinement(target, settings.tokens, settings.held_out_tokens, blocks))
    if paths.refine_state(target).is_dir():
        shutil.rmtree(paths.refine_state(target))
    clear(paths)


def _training(tokens: int, blocks: Sequence[BlockRefinement]) -> str:
    """Say for the model card how the weights were made."""
    if not blocks:
        return "Weights: the parent's, and variants trained by blockwise local distillation (BLD); no correction."
    last = blocks[-1]
    return (
        f"Weights: assembled from blockwise distilled variants, then corrected in closed form on {tokens:,} "
        f"tokens; error of the last hidden states {last.error_assembled:.3f} before, {last.error_refined:.3f} after."
    )


class _ChildCorrection:
    """The walk through a child, and what it left on disk: corrected blocks, and the states before one of them.

    `_start` is the first block that is not the parent's. The key of a block, and of the states before it, covers all
    blocks before it.
    """

    def __init__(self, target: str, replacements: Sequence[Replacement], params: Params, paths: Paths) -> None:
        run, self._params, self._replacements = params.run, params, replacements
        self._parent = Parent(paths.parent)
        self._config = self._parent.config
        self._compute = prepare_compute(run.device, run.dtype, run.threads)
        rebuild = f"dvc repro refine_child@{target}"
        self._assembled = Checkpoint(paths.assembled(target), f"dvc repro assemble_child@{target}")
        self._sequences = _sequences(params)
        streams = {stream: len(self._sequences[split]) for stream, split in _STREAMS.items()}
        self._pieces = Pieces(paths.refine_state(target) / "blocks", rebuild)
        self._states = ChildStates(paths.refine_state(target) / "states", rebuild, streams)
        read = {split: sequences.stop for split, sequences in self._sequences.items()}
        self._activations = Activations(params, paths, read, "refine_child")
        self._start = self._first_replaced() if params.refine_child.tokens else len(replacements)
        self._keys = self._chained_keys()

    def run(self) -> tuple[BlockRefinement, ...]:
        """Correct the blocks that are still to correct; return the course of all."""
        walked = range(self._start, len(self._replacements))
        missing = set(self._pieces.keep_only({_name(index): self._keys[index + 1] for index in walked}))
        with ThreadPoolExecutor(self._params.run.workers) as pool:
            for index in tqdm(walked, desc="refine", unit="block", disable=None):
                if _name(index) in missing:
                    self._bring_states(index, pool)
                    self._activations.hold(self._replacements[index].first_block)
                    self._correct(index, pool)
        untouched = [BlockRefinement(block.first_block, block.span, (), 0.0, 0.0) for block in self._replacements]
        return (*untouched[: self._start], *map(self._record, walked))

    def tensors(self) -> Iterator[Tensors]:
        """Yield the tensors of each block of the corrected child, named as within a Llama layer."""
        return map(self._corrected, range(len(self._replacements)))

    def _first_replaced(self) -> int:
        """Count the leading blocks that are the parent's."""
        theirs = parent_attention(self._config), parent_ffn(self._config)
        for index, block in enumerate(self._replacements):
            if block.span > 1 or (block.attention, block.ffn) != theirs:
                return index
        return len(self._replacements)

    def _chained_keys(self) -> dict[int, str]:
        """Return content keys of the states before each block from `_start` on, and of the corrected block before."""
        key = digest_of(
            {
                "settings": self._params.refine_child.model_dump(),
                "run": self._params.run.model_dump(exclude={"workers"}),
                "config": self._config.to_json(),
                "code": code_digest("tasks.refine_child:_ChildCorrection"),
            }
        )
        keys = {}
        for index in range(self._start, len(self._replacements)):
            block = self._replacements[index]
            keys[index] = digest_of([key, self._read_at(block.first_block)])
            child = asdict(block), self._assembled.block_digest(index)
            key = digest_of([keys[index], child, self._read_at(block.parent_blocks.stop)])
        return {**keys, len(self._replacements): key}

    def _read_at(self, boundary: int) -> list[str]:
        """Return content keys of what is read at one of the parent's boundaries; they cover the blocks before it."""
        ranges = self._sequences.items()
        return [self._activations.key(split, boundary, sequences[0], sequences[-1] + 1) for split, sequences in ranges]

    def _bring_states(self, index: int, pool: Executor) -> None:
        """Bring the child's states before a block to disk, and delete those before other blocks."""
        at = index
        while at > self._start and not self._states.are_whole(at, self._keys[at]):
            at -= 1
        if at == self._start and not self._states.are_whole(at, self._keys[at]):
            self._activations.hold(self._replacements[at].first_block)
            self._write_states(at, self._parents_states(), pool)
        while at < index:
            self._write_states(at + 1, self._behind(at), pool)
            at += 1
            self._states.keep_only(at)
        self._states.keep_only(index)

    def _write_states(self, index: int, streams: Mapping[str, Callable[[int], Tensor]], pool: Executor) -> None:
        """Write the states before a block; each stream has a function from a sequence's number to its states."""
        for stream, states in streams.items():
            each = self._each(pool, states, self._states.streams[stream])
            self._states.write(index, self._keys[index], stream, each)

    def _parents_states(self) -> dict[str, Callable[[int], Tensor]]:
        """Return readers of the parent's states before the first replaced block."""
        boundary = self._replacements[self._start].first_block
        readers = {stream: self._parent_reader(split, boundary) for stream, split in _STREAMS.items()}
        return {stream: partial(_one, reader) for stream, reader in readers.items()}

    def _behind(self, index: int) -> dict[str, Callable[[int], Tensor]]:
        """Return readers of states behind a corrected block; the child's as assembled pass the block as it was."""
        assembled = self._block(index, self._assembled_block(index))
        corrected = self._block(index, self._corrected(index))
        return {
            stream: self._forward(index, stream, assembled if stream == "assembled" else corrected)
            for stream in _STREAMS
        }

    def _forward(self, index: int, stream: str, block: Block) -> Callable[[int], Tensor]:
        reader = self._states.reader(index, stream)

        def states(sequence: int) -> Tensor:
            hidden = reader.read([sequence]).to(*self._compute)
            behind: Tensor = block(hidden, rotary_for(self._config, hidden.shape[1], hidden))
            return behind

        return states

    def _parent_reader(self, split: SplitName, boundary: int) -> Callable[[range], Tensor]:
        """Return a function from sequences' numbers in their stream to the parent's states at a boundary."""
        reader, first = self._activations.reader(split, boundary), self._sequences[split].start
        return lambda sequences: reader.read([first + sequence for sequence in sequences]).to(*self._compute)

    def _correct(self, index: int, pool: Executor) -> None:
        """Correct one block and write it, with its course."""
        replacement, assembled = self._replacements[index], self._assembled_block(index)
        theirs = self._parent.block(replacement.first_block, *self._compute)
        parent_block = Block.load(self._config, parent_attention(self._config), parent_ffn(self._config), theirs)
        tensors, course = assembled, list[SubblockRefinement]()
        for subblock in corrected_subblocks(replacement):
            block = self._block(index, tensors)
            fitted_on = self._moments(index, subblock, block, parent_block, "train", pool)
            held_out = self._moments(index, subblock, block, parent_block, "calibration", pool)
            variant = replacement.attention if subblock == "attention" else replacement.ffn
            tensors, correction = correct(tensors, variant, fitted_on, held_out, partial(self._each, pool))
            course.append(SubblockRefinement(subblock, **asdict(correction)))
        errors = (
            self._error(index, "assembled", assembled, pool),
            self._error(index, "calibration", tensors, pool),
        )
        path = self._pieces.folder / f"{_name(index)}.safetensors"
        with write_whole(path) as temporary:
            save_file(tensors, temporary)
        record = BlockRefinement(replacement.first_block, replacement.span, tuple(course), *errors)
        self._pieces.finish(_name(index), self._keys[index + 1], [path], asdict(record))

    def _moments(
        self, index: int, subblock: SubblockName, block: Block, parent_block: Block, stream: str, pool: Executor
    ) -> Moments:
        """Sum up what the correction of a subblock needs over a stream, in the order of its sequences."""
        replacement, split = self._replacements[index], _STREAMS[stream]
        reader, count = self._states.reader(index, stream), self._states.streams[stream]
        before = self._parent_reader(split, replacement.first_block)
        behind = self._parent_reader(split, replacement.parent_blocks.stop)

        def of_group(group: int) -> Moments:
            sequences = range(count)[group * _GROUP : (group + 1) * _GROUP]
            hidden = reader.read(sequences).to(*self._compute)
            parent = ParentStates(before(sequences), behind(sequences))
            return moments(self._config, subblock, block, parent_block, hidden, parent)

        each = self._each(pool, of_group, math.ceil(count / _GROUP))
        total = next(each)
        for group_moments in each:
            total.add(group_moments)
        return total

    def _error(self, index: int, stream: str, tensors: Tensors, pool: Executor) -> float:
        """Measure how far the child's states behind a block are from the parent's on held-out tokens."""
        states = self._forward(index, stream, self._block(index, tensors))
        target = self._parent_reader("calibration", self._replacements[index].parent_blocks.stop)
        count = self._states.streams[stream]
        return fmean(self._each(pool, lambda sequence: relative_error(states(sequence), _one(target, sequence)), count))

    def _each(self, pool: Executor, compute: Callable[[int], T], count: int) -> Iterator[T]:
        """Compute something of the numbers 0 .. count - 1 on the workers, as many at once, and yield it in order."""
        run = self._params.run

        def on_worker(number: int) -> T:
            prepare_compute(run.device, run.dtype, run.threads)
            with torch.no_grad():
                return compute(number)

        for start in range(0, count, run.workers):
            yield from pool.map(on_worker, range(start, min(start + run.workers, count)))

    def _assembled_block(self, index: int) -> Tensors:
        """Read a block of the child as assembled, in the dtype of its checkpoint."""
        return {short: self._assembled.tensor(name) for short, name in self._assembled.block_names(index).items()}

    def _corrected(self, index: int) -> Tensors:
        """Read a block of the corrected child, in the same dtype."""
        if index < self._start:
            return self._assembled_block(index)
        (name,) = self._pieces.get(_name(index))["files"]
        return load_file(self._pieces.folder / name)

    def _block(self, index: int, tensors: Tensors) -> Block:
        replacement = self._replacements[index]
        on_device = {name: tensor.to(*self._compute) for name, tensor in tensors.items()}
        return Block.load(self._config, replacement.attention, replacement.ffn, on_device)

    def _record(self, index: int) -> BlockRefinement:
        facts = self._pieces.get(_name(index))["facts"]
        return as_record(facts, BlockRefinement, str(self._pieces.folder), self._pieces.rebuild)


def _one(read: Callable[[range], Tensor], sequence: int) -> Tensor:
    """Read the states of one sequence."""
    return read(range(sequence, sequence + 1))


def _name(block_index: int) -> str:
    """Return the name of the piece that is a corrected block."""
    return f"block_{block_index:03d}"


def _sequences(params: Params) -> dict[SplitName, range]:
    """Plan the sequences of each split: BLD's first ones for the fits, the end of calibration to choose the ridges."""
    settings, seq_len = params.refine_child, params.prepare_corpus.seq_len
    stop = params.prepare_corpus.calibration_tokens // seq_len
    first = stop - settings.held_out_tokens // seq_len
    return {"train": range(settings.tokens // seq_len), "calibration": range(first, stop)}
