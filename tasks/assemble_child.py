"""assemble_child: architecture.json + parent + library -> the child's checkpoint in nemotron-nas form.

The checkpoint is written block by block. Run: `puzzle stage assemble_child --target like-51b`.
"""

from collections.abc import Iterator, Sequence

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from tqdm import tqdm

from storage.library import Library
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.variants import Replacement
from tasks.checkpoints.children import architecture_for, publish
from tasks.tensors.replacements import ReplacementWeights

TRAINING = "Weights: the parent's, and variants trained by blockwise local distillation (BLD); no global distillation."


@task(cache_policy=NO_CACHE)
def assemble(target: str, params: Params, paths: Paths) -> None:
    """Write the child of `target`; an earlier one stays until the new one is whole.

    Raises:
        InputError: the architecture was made for another parent.
    """
    parent, library = Parent(paths.parent), Library(paths.library)
    chosen = architecture_for(parent, target, paths)
    library.prefetch(chosen.blocks)
    blocks = _blocks(chosen.blocks, parent, library)
    max_shard_gib = params.assemble_child.max_shard_gib
    publish(paths.assembled(target), chosen, parent, blocks, TRAINING, max_shard_gib)


def _blocks(blocks: Sequence[Replacement], parent: Parent, library: Library) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each block, from the parent and the library."""
    dtype, cpu = parent.checkpoint.dtype, torch.device("cpu")
    for replacement in tqdm(blocks, desc="assemble", unit="block", disable=None):
        yield ReplacementWeights(parent, library, cpu, dtype).tensors(replacement, "decoupled")
