"""cache_activations: the parent's hidden states at block boundaries -> artifacts/activations/, one piece per shard.

In: the parent and the corpus. Run: `puzzle stage cache_activations`. The splits train and calibration keep all
boundaries (for BLD and scores), in rolling mode the first, the last and those that params name. Validation keeps the
last one only, from which the parent's logits come at evaluation. Train sequences for which GKD's teacher runs live are
left out. Shards go through the parent block by block, so memory does not grow with depth: one on a CPU, on a GPU as
many together as its memory holds, since there a block takes longer to read than a shard to compute.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage.activations import FORMAT_VERSION, REBUILD, shard_name, shard_path, write_shard
from storage.code_digest import code_digest
from storage.corpus import SPLITS, SplitName, read_manifest, read_sequences
from storage.fields import resolved
from storage.files import InputError, digest_of, sha256
from storage.model_config import EMBEDDING
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces
from storage.records import ELEMENT_BYTES
from tasks.puzzle.model.ahead import Ahead
from tasks.puzzle.model.boundaries import advance, embed
from tasks.puzzle.model.device import gpu_bytes, prepare_compute
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tasks.tensors.activations import STORED, read_tokens
from tasks.tensors.teacher import cached_train_tokens


@dataclass(frozen=True)
class Shard:
    """Sequences start .. stop-1 of a split, to write at `stored_boundaries`.

    how: digest of all inputs to hidden states except tokens and the parent's blocks.
    content: digest of all inputs except the parent's blocks.
    key: content key of the shard's piece.
    """

    split: SplitName
    index: int
    start: int
    stop: int
    stored_boundaries: tuple[int, ...]
    how: str
    content: str
    key: str

    @property
    def name(self) -> str:
        """Return the name of the shard's piece."""
        return shard_name(self.split, self.index)


@task(cache_policy=NO_CACHE)
def plan_shards(params: Params, paths: Paths) -> list[Shard]:
    """Plan the shards that are still to write; delete the pieces that no shard has."""
    parent, manifest = Parent(paths.parent), read_manifest(paths.corpus)
    size = params.cache_activations.sequences_per_shard
    inputs = {
        "embedding": parent.checkpoint.checksums[EMBEDDING],
        "config": parent.config.to_json(),
        "run": [params.run.dtype, params.run.device, params.run.threads],
        "dtype": params.cache_activations.dtype,
        "sequences_per_batch": params.cache_activations.sequences_per_batch,
        "sequences_per_shard": size,
        "code": code_digest("tasks.cache_activations:cache_shards", "tasks.tensors.activations:Activations"),
        "format": FORMAT_VERSION,
    }
    how, shards = digest_of(inputs), []
    for split in SPLITS:
        facts = manifest.splits[split]
        stored_boundaries, sequences = _stored_boundaries(split, params, parent), facts.sequences
        if split == "train":
            sequences = -(-cached_train_tokens(params, parent.config, facts.tokens) // manifest.seq_len)
        for index, start in enumerate(range(0, sequences, size)):
            stop = min(start + size, facts.sequences)
            tokens = read_sequences(paths.corpus, split, start, stop)
            content = digest_of([how, tokens.shape, digest_of(tokens.tobytes().hex())])
            key = digest_of([content, parent.digest, stored_boundaries])
            shards.append(Shard(split, index, start, stop, stored_boundaries, how, content, key))
    missing = set(Pieces(paths.activations, REBUILD).keep_only({shard.name: shard.key for shard in shards}))
    return [shard for shard in shards if shard.name in missing]


def _stored_boundaries(split: SplitName, params: Params, parent: Parent) -> tuple[int, ...]:
    """Return the boundaries of a split that stay on disk."""
    settings, last = params.cache_activations, parent.config.num_blocks
    for boundary in settings.keep:
        if not 0 <= boundary <= last:
            raise InputError(
                f"cache_activations.keep names boundary {boundary}, {parent.info.name} has 0 to {last}; change it"
            )
    if split == "validation":
        return (last,)
    return tuple(sorted({0, last, *settings.keep})) if settings.rolling else tuple(range(last + 1))


def grouped(shards: Sequence[Shard], params: Params, paths: Paths) -> list[Sequence[Shard]]:
    """Group shards that go through the parent together; which do changes no byte."""
    run, config = params.run, Parent(paths.parent).config
    tokens = params.cache_activations.sequences_per_shard * params.prepare_corpus.seq_len
    shard_bytes = tokens * config.hidden_size * ELEMENT_BYTES[run.dtype]
    size = _shards_at_once(torch.device(run.device), shard_bytes, run.workers)
    return [shards[start : start + size] for start in range(0, len(shards), size)]


def _shards_at_once(device: torch.device, shard_bytes: int, workers: int) -> int:
    """Return how many shards go through a block that is read once: as many as a quarter of a GPU's memory holds."""
    if device.type == "cpu":
        return 1
    return max(1, gpu_bytes(device) // (4 * workers * shard_bytes))


@task(cache_policy=NO_CACHE)
def cache_shards(shards: Sequence[Shard], params: Params, paths: Paths) -> None:
    """Write shards at every boundary that their splits keep; they go through each block together, once it is read.

    Raises:
        InputError: hidden states are NaN or infinite.
    """
    run, parent, settings = params.run, Parent(paths.parent), params.cache_activations
    compute = prepare_compute(run.device, run.dtype, run.threads)
    num_blocks, variants = parent.config.num_blocks, (parent_attention(parent.config), parent_ffn(parent.config))
    embedding, _, _ = parent.outside(*compute)
    tokens = (read_tokens(paths, shard.split, range(shard.start, shard.stop)) for shard in shards)
    states = [embed(embedding, ids) for ids in tokens]
    del embedding
    blocks = Ahead((parent.block(index, *compute) for index in range(num_blocks)), compute.device)
    metadata = {"parent": parent.digest, "corpus": read_manifest(paths.corpus).content_hash}
    written: list[list[Future[tuple[Path, str]]]] = [[] for _ in shards]

    def write(shard: Shard, boundary: int, hidden: Tensor) -> tuple[Path, str]:
        if not hidden.isfinite().all():
            raise InputError(
                f"the hidden states of {parent.info.name} at boundary {boundary} are not finite: its weights overflow "
                f"in {compute.dtype}; set run.dtype to float32, or take another revision of it"
            )
        path = shard_path(paths.activations, shard.split, boundary, shard.index)
        place = {"split": shard.split, "boundary": str(boundary), "first_sequence": str(shard.start)}
        write_shard(path, hidden, {**metadata, **place})
        return path, sha256(path)

    with ThreadPoolExecutor(1) as writer:  # writes while the next shard or block computes; at most one file waits
        latest: Future[tuple[Path, str]] | None = None
        for boundary in range(num_blocks + 1):
            if boundary:
                block = (*variants, next(blocks))
                for number, hidden in enumerate(states):
                    states[number] = advance(parent.config, block, hidden, resolved(settings.sequences_per_batch))
            for shard, hidden, files in zip(shards, states, written, strict=True):
                if boundary in shard.stored_boundaries:
                    stored = hidden.to(STORED[settings.dtype]).cpu()
                    if latest:
                        latest.result()
                    latest = writer.submit(write, shard, boundary, stored)
                    files.append(latest)
    for shard, files in zip(shards, written, strict=True):
        facts = {
            "sequences_per_shard": settings.sequences_per_shard,
            "sequences": shard.stop - shard.start,
            "how": shard.how,
            "content": shard.content,
            "stored_boundaries": shard.stored_boundaries,
        }
        checksums = dict(future.result() for future in files)
        Pieces(paths.activations, REBUILD).finish(shard.name, shard.key, checksums, facts)
