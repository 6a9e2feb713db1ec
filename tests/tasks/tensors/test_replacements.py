"""ReplacementWeights: which tensors are read for a block or a span."""

from pathlib import Path

import torch

from storage.library import Library, channel_order_name, entry_name, whole_name
from storage.parent import Parent
from storage.paths import Paths
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.model.initialise import Tensors, attention_part, ffn_part, initial_ffn
from tasks.tensors.replacements import ReplacementWeights
from tests.stages import cache, distill, prepare

CPU = torch.device("cpu")


def same(tensors: Tensors, other: Tensors) -> bool:
    return tensors.keys() == other.keys() and all(torch.equal(tensors[name], other[name]) for name in tensors)


def read(paths: Paths) -> ReplacementWeights:
    return ReplacementWeights(Parent(paths.parent), Library(paths.library), CPU, torch.float32)


def test_a_spans_halves_are_its_whole_blocks_and_its_variants(tmp_path: Path) -> None:
    params, paths = prepare("llama", tmp_path, distill_blocks={"spans": [2]})
    cache(params, paths)
    distill(params, paths)
    library, parent = Library(paths.library), Parent(paths.parent)
    whole, parents = library.read(whole_name(1, 2)), parent.block(1, CPU, torch.float32)
    start = parent.block(library.start_of(1, 2), CPU, torch.float32)
    assert library.start_of(1, 2) in (1, 2) and library.start_of(1, 1) == 1
    kv, narrow = Attention("gqa", 1), Ffn("gated", 48)
    full = Replacement(1, 2, Attention("gqa", 2), Ffn("gated", 96))
    assert same(read(paths).tensors(full, "decoupled"), whole)
    assert same(read(paths).tensors(full, "initial"), start)
    trained = read(paths).tensors(Replacement(1, 2, kv, full.ffn), "decoupled")
    assert same(trained, library.read(entry_name(1, kv, 2)) | ffn_part(whole))
    dropped = read(paths).tensors(Replacement(1, 2, Attention("no_op"), narrow), "decoupled")
    assert same(dropped, library.read(entry_name(1, narrow, 2)))
    order = library.read(channel_order_name(library.start_of(1, 2)))["order"]
    untrained = read(paths).tensors(Replacement(1, 2, full.attention, narrow), "initial")
    assert same(untrained, attention_part(start) | initial_ffn(start, narrow, order))
    single = read(paths).tensors(Replacement(1, 1, kv, full.ffn), "decoupled")
    assert same(single, library.read(entry_name(1, kv)) | ffn_part(parents))
