"""Run stages in this process as their flows do (plan, make the pieces, finish), without Prefect's server and DVC."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from storage.architecture import write_architecture
from storage.files import sha256
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.variants import Attention, Ffn, Replacement
from tasks import (
    assemble_child,
    benchmark_throughput,
    cache_activations,
    distill_blocks,
    refine_child,
    score_blocks,
)
from tasks.prepare_parent import prepare_parent
from tests.chosen import chosen_architecture
from tests.settings import SEQ_LEN, tiny_params
from tests.tiny import SIZES, save_tiny, save_tokenizer, tiny_corpus

CHILD = [("kv_1", "ffn_48"), ("no_op", "ffn_24"), ("kv_2", "no_op")]


def prepare(family: str, root: Path, **overrides: dict[str, Any]) -> tuple[Params, Paths]:
    """Make a tiny parent and corpus as artifacts under `root`; return the params that made them, and their paths."""
    save_tiny(family, root / "source")
    save_tokenizer(root / "source")
    params = tiny_params(**overrides, prepare_parent={"source": str(root / "source")})
    paths = Paths(root / "artifacts")
    prepare_parent.fn(params, paths)
    tiny_corpus(paths.corpus, SIZES["vocab_size"], SEQ_LEN)
    return params, paths


def cache(params: Params, paths: Paths) -> list[str]:
    """Run cache_activations; return the names of the shards that it made."""
    shards = cache_activations.plan_shards.fn(params, paths)
    for shard in shards:
        cache_activations.cache_shards.fn([shard], params, paths)
    return [shard.name for shard in shards]


def planned_variants(params: Params, paths: Paths) -> list[str]:
    """Return the names of the library entries that distill_blocks would train."""
    return [
        name
        for plan in distill_blocks.plan_blocks.fn(params, paths)
        for name in plan.missing
        if not name.endswith("channel_order")
    ]


def distill(params: Params, paths: Paths) -> list[str]:
    """Run distill_blocks; return the names of the entries that it trained."""
    plans = distill_blocks.plan_blocks.fn(params, paths)
    for plan in plans:
        distill_blocks.train_block.fn(plan, params, paths)
    distill_blocks.write_library_index.fn(paths)
    return [name for plan in plans for name in plan.missing if not name.endswith("channel_order")]


def assemble(params: Params, paths: Paths, variants: list[tuple[str, str]]) -> None:
    """Assemble target `small` from these attention and FFN variants, a pair for each block of the parent."""
    blocks = [
        Replacement(index, 1, Attention.parse(attention), Ffn.parse(ffn))
        for index, (attention, ffn) in enumerate(variants)
    ]
    assemble_blocks(params, paths, blocks)


def assemble_blocks(params: Params, paths: Paths, blocks: list[Replacement]) -> None:
    """Assemble target `small` from these blocks."""
    parent = Parent(paths.parent)
    chosen = chosen_architecture(blocks, parent.info.name, parent.digest)
    write_architecture(paths.architecture("small"), chosen)
    assemble_child.assemble.fn("small", params, paths)


def refine(params: Params, paths: Paths) -> None:
    """Run refine_child on target `small`."""
    refine_child.refine.fn("small", params, paths)


def score(params: Params, paths: Paths) -> list[score_blocks.ScoreJob]:
    """Run score_blocks; return the jobs that it computed."""
    groups = score_blocks.plan_groups.fn(params, paths)
    for group in groups:
        score_blocks.score_jobs.fn(group, params, paths)
    removals = score_blocks.scores_of_removals.fn(params, paths)
    while batches := score_blocks.plan_removals.fn(removals, params, paths):
        for batch in batches:
            score_blocks.score_removal.fn(batch, params, paths)
    score_blocks.write_score_table.fn(removals, params, paths)
    return [job for group in groups for job in group.jobs]


def benchmark(params: Params, paths: Paths, target: str) -> None:
    """Run benchmark_throughput."""
    rows = benchmark_throughput.model_throughput.fn(target, params, paths)
    rows += benchmark_throughput.measure_throughput.fn(target, params, paths)
    benchmark_throughput.write_rows.fn(target, rows, paths)


STAGES: tuple[Callable[[Params, Paths], Any], ...] = (cache, distill, score)


@contextmanager
def interrupted(module: ModuleType, name: str, after: int) -> Iterator[None]:
    """Let a function of a module be called `after` times; its next call is interrupted, as by Ctrl-C."""
    function, calls = getattr(module, name), iter(range(after))

    def interrupting(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, interrupting)
        yield


def calls_of(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return a list that gets the arguments of every call of a module's function from now on."""
    function, calls = getattr(module, name), list[tuple[Any, ...]]()

    def recording(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(module, name, recording)
    return calls


def checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file by its path below `folder`."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def make_child(params: Params, paths: Paths) -> list[str]:
    """Make a child from a trained library; return the shards of the activation cache."""
    shards = cache(params, paths)
    distill(params, paths)
    assemble(params, paths, CHILD)
    refine(params, paths)
    return shards
