"""assemble_child: architecture.json + parent + library -> a checkpoint in nemotron-nas form, written block by block."""

from collections.abc import Iterator

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from tqdm import tqdm

from storage.library import Library
from storage.model_config import EMBEDDING
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.records import Architecture
from tasks.children import publish, read_architecture
from tasks.replacements import Replacements

TRAINING = "Weights: the parent's, and variants trained by blockwise local distillation (BLD); no global distillation."


@task(cache_policy=NO_CACHE)
def assemble(target: str, params: Params, paths: Paths) -> None:
    """Write the child of `target`; an earlier one stays until the new one is whole.

    Raises:
        InputError: the architecture was made for another parent.
    """
    parent, library = Parent(paths.parent), Library(paths.library)
    rebuild = f"dvc repro search_architecture@{target}"
    chosen, architecture = read_architecture(paths.architecture(target), parent, rebuild)
    blocks = _blocks(architecture, parent, library)
    max_shard_gib = params.assemble_child.max_shard_gib
    publish(paths.assembled(target), chosen, architecture, parent, blocks, TRAINING, max_shard_gib)


def _blocks(architecture: Architecture, parent: Parent, library: Library) -> Iterator[dict[str, Tensor]]:
    """Tensors of each block, from the parent and the library."""
    dtype, cpu = parent.checkpoint.tensor(EMBEDDING).dtype, torch.device("cpu")
    for replacement in tqdm(architecture.blocks, desc="assemble", unit="block", disable=None):
        yield Replacements(parent, library, cpu, dtype).tensors(replacement, "decoupled")
