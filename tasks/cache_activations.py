"""cache_activations: the parent's hidden states at block boundaries -> artifacts/activations/, a shard a piece.

train and calibration keep all boundaries (BLD, scores); validation keeps the last one only, from which the parent's
logits come at evaluation. A shard walks through the parent block by block, so memory does not grow with depth.
"""

from dataclasses import dataclass

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.activations import FORMAT_VERSION, REBUILD, shard_name, shard_path, write_shard
from storage.corpus import SplitName, read_manifest, read_sequences
from storage.files import digest_of
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces, code_digest
from tasks.puzzle.boundaries import boundaries
from tasks.puzzle.device import compute
from tasks.puzzle.variants import parent_attention, parent_ffn

ALL_BOUNDARIES: tuple[SplitName, ...] = ("train", "calibration")


@dataclass(frozen=True)
class Shard:
    """Sequences start .. stop-1 of a split; `key` is the content key of its piece."""

    split: SplitName
    index: int
    start: int
    stop: int
    key: str

    @property
    def name(self) -> str:
        """Name of its piece."""
        return shard_name(self.split, self.index)


@task(cache_policy=NO_CACHE)
def plan_shards(params: Params, paths: Paths) -> list[Shard]:
    """Shards still to write; finished ones stay, strangers are deleted."""
    parent, manifest = Parent(paths.parent), read_manifest(paths.corpus)
    size = params.cache_activations.sequences_per_shard
    common = {
        "parent": parent.digest,
        "run": [params.run.dtype, params.run.device, params.run.threads],
        "dtype": params.cache_activations.dtype,
        "sequences_per_batch": params.cache_activations.sequences_per_batch,
        "sequences_per_shard": size,
        "code": code_digest("tasks.cache_activations"),
        "format": FORMAT_VERSION,
    }
    shards = []
    for split, facts in manifest.splits.items():
        for index, start in enumerate(range(0, facts.sequences, size)):
            stop = min(start + size, facts.sequences)
            tokens = read_sequences(paths.corpus, split, start, stop).tobytes().hex()
            key = digest_of({**common, "tokens": digest_of(tokens), "all": split in ALL_BOUNDARIES})
            shards.append(Shard(split, index, start, stop, key))
    missing = set(Pieces(paths.activations, REBUILD).keep_only({shard.name: shard.key for shard in shards}))
    return [shard for shard in shards if shard.name in missing]


@task(cache_policy=NO_CACHE)
def cache_shard(shard: Shard, params: Params, paths: Paths) -> None:
    """Write one shard at all boundaries that its split keeps."""
    run, parent = params.run, Parent(paths.parent)
    device = compute(run.device, run.dtype, run.threads)
    config = parent.config
    tokens = torch.from_numpy(read_sequences(paths.corpus, shard.split, shard.start, shard.stop)).long()
    embedding, _, _ = parent.outside(device.device, device.dtype)
    variants = parent_attention(config), parent_ffn(config)
    blocks = ((*variants, parent.block(i, device.device, device.dtype)) for i in range(config.num_blocks))
    stored = {"bfloat16": torch.bfloat16, "float32": torch.float32}[params.cache_activations.dtype]
    metadata = {"parent": parent.digest, "corpus": read_manifest(paths.corpus).content_hash, "split": shard.split}
    files = []
    states = boundaries(config, embedding, blocks, tokens, params.cache_activations.sequences_per_batch)
    for boundary, hidden in enumerate(states):
        if shard.split in ALL_BOUNDARIES or boundary == config.num_blocks:
            path = shard_path(paths.activations, shard.split, boundary, shard.index)
            write_shard(
                path,
                hidden.to(stored).cpu(),
                {**metadata, "boundary": str(boundary), "first_sequence": str(shard.start)},
            )
            files.append(path)
    facts = {"sequences_per_shard": params.cache_activations.sequences_per_shard, "sequences": shard.stop - shard.start}
    Pieces(paths.activations, REBUILD).finish(shard.name, shard.key, files, facts)
