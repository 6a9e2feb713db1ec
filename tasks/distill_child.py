"""distill_child: the corrected child + the parent's states -> children/<target>/distilled/ and gkd.json (GKD).

It trains on the train sequences behind those that BLD used, each once: on threads of this process, or in shards on
ranks of torchrun (`distill_child.ranks`, tasks/gkd/ranks.py). A run that was killed goes on from its checkpoint. With
`distill_child.tokens: 0` nothing trains, and distilled/ has the weights of refined/.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace

from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from storage.checkpoints import Checkpoint
from storage.gkd import GkdCurve, write_gkd
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.variants import Replacement
from tasks.checkpoints.children import architecture_for, publish
from tasks.gkd.course import Measurement, Watch
from tasks.gkd.threads import train_in_threads
from tasks.puzzle.distill.extrapolation import longer_training

__all__ = ["Measurement", "distill"]

_LONGER = 10
"""The multiple of the tokens for which gkd.json says what to expect."""


def _unwatched(_: Measurement) -> None:
    """Show nothing."""


@task(cache_policy=NO_CACHE)
def distill(target: str, params: Params, paths: Paths, watch: Watch = _unwatched) -> None:
    """Train the child of `target` and publish its best weights.

    Raises:
        InputError: the child was assembled for another parent, or the training does not stay finite.
    """
    parent = Parent(paths.parent)
    chosen = architecture_for(parent, target, paths)
    curve, blocks = _trained(target, chosen.blocks, params, paths, watch)
    publish(
        paths.distilled(target), chosen, parent, blocks, _sentence(curve, params), params.assemble_child.max_shard_gib
    )
    measured = [(measurement.tokens, measurement.kl) for measurement in curve.held_out]
    write_gkd(paths.gkd(target), replace(curve, modelled=longer_training(measured, _LONGER)))
    if paths.gkd_state(target).is_dir():
        shutil.rmtree(paths.gkd_state(target))


def _trained(
    target: str, replacements: Sequence[Replacement], params: Params, paths: Paths, watch: Watch
) -> tuple[GkdCurve, Iterator[dict[str, Tensor]]]:
    """Train as params say; return the curve, and the best weights block by block."""
    if not params.distill_child.tokens:
        refined = Checkpoint(paths.refined(target), f"dvc repro refine_child@{target}")
        names = (refined.block_names(index) for index in range(len(replacements)))
        blocks = ({short: refined.tensor(name) for short, name in block.items()} for block in names)
        return GkdCurve(target, (), (), 0), blocks
    if params.distill_child.ranks:
        from tasks.gkd.launch import train_on_ranks  # what it imports of torch takes a second

        return train_on_ranks(target, replacements, params, paths, watch)
    return train_in_threads(target, replacements, params, paths, watch)


def _sentence(curve: GkdCurve, params: Params) -> str:
    """Say for the model card how the weights were made."""
    corrected = "corrected in closed form, " if params.refine_child.tokens else ""
    if not curve.held_out:
        return f"Weights: assembled from blockwise distilled variants, {corrected}not globally distilled (no GKD)."
    return (
        f"Weights: assembled from blockwise distilled variants, {corrected}then globally distilled (GKD) on "
        f"{curve.best.tokens:,} tokens; held-out KL {curve.held_out[0].kl:.3f} before, {curve.best.kl:.3f} after "
        "(nats/token)."
    )
