"""What a global distillation reads: the corrected child, the parent's hidden states, and the key that covers them all.

The parent's hidden states come from the activation cache, and the cosine loss is taken at the boundaries that it keeps;
or from the parent itself (tasks/tensors/teacher.py), at all of them. Those of held-out text are always in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from storage.activations import REBUILD, BoundaryReader, shard_name
from storage.checkpoints import Checkpoint, read_blocks
from storage.files import digest_of
from storage.model_config import ModelConfig
from storage.params import Params
from storage.parent import Parent
from storage.paths import Paths
from storage.pieces import Pieces
from storage.variants import Attention, Ffn, Replacement
from tasks.gkd.course import Course, held_out
from tasks.puzzle.distill.gkd import States, Teacher
from tasks.puzzle.model.blocks import Block
from tasks.puzzle.model.device import Compute
from tasks.puzzle.model.head import Head
from tasks.puzzle.search_space import parent_attention, parent_ffn
from tasks.tensors.activations import read_tokens
from tasks.tensors.teacher import teacher_is_live


class ParentStates(Protocol):
    """The parent's hidden states of train sequences."""

    def of(self, sequences: Sequence[int]) -> States:
        """Return a function from a boundary to the states of these sequences, [sequences, tokens, hidden]."""
        ...


class CachedStates:
    """The parent's hidden states of a split's sequences, read from the activation cache."""

    def __init__(self, split: str, boundaries: Sequence[int], compute: Compute, paths: Paths) -> None:
        self._compute = compute
        self._readers = {boundary: BoundaryReader(paths.activations, split, boundary) for boundary in boundaries}

    def of(self, sequences: Sequence[int]) -> States:
        """Return a function that reads a boundary of some sequences."""
        return lambda boundary: self._readers[boundary].read(sequences).to(*self._compute)


class LiveStates:
    """The parent's hidden states of train sequences, computed when they are asked for."""

    def __init__(self, tokens: Tensor, first: int, compute: Compute, paths: Paths) -> None:
        parent, self._tokens, self._first = Parent(paths.parent), tokens, first
        variants = parent_attention(parent.config), parent_ffn(parent.config)
        blocks = [
            Block.load(parent.config, *variants, parent.block(index, *compute))
            for index in range(parent.config.num_blocks)
        ]
        embedding, _, _ = parent.outside(*compute)
        self._teacher = Teacher(parent.config, embedding, blocks)

    def of(self, sequences: Sequence[int]) -> States:
        """Compute all boundaries of some sequences."""
        return self._teacher.states(self._tokens[[sequence - self._first for sequence in sequences]])


@dataclass(frozen=True)
class Material:
    """The input of a child's training, found and not yet loaded.

    Attributes:
        refined: the corrected child's checkpoint.
        config: its geometry.
        variants: attention and FFN variant of each of its blocks.
        ends: the parent's boundary behind each block, None where the cosine loss leaves it out.
        first: the first train sequence.
        tokens: token ids of the train sequences, [sequences, tokens] int64; None where the teacher is the cache.
        digest: the digest of all of it, and of the params that say what is computed with it.
    """

    refined: Checkpoint
    config: ModelConfig
    variants: list[tuple[Attention, Ffn]]
    ends: list[int | None]
    first: int
    tokens: Tensor | None
    digest: str

    @property
    def boundaries(self) -> list[int]:
        """Return the boundaries of the parent that the training compares with, and where the child starts."""
        return [0, *(end for end in self.ends if end is not None)]


def material_of(course: Course, replacements: Sequence[Replacement], params: Params, paths: Paths) -> Material:
    """Find what the training of a target's child reads; weights are not read.

    Args:
        course: the training's course.
        replacements: the blocks of the child's architecture.
        params: the project's params.
        paths: the artifacts.
    """
    target, settings, parent = course.curve.target, params.distill_child, Parent(paths.parent)
    refined = Checkpoint(paths.refined(target), f"dvc repro refine_child@{target}")
    config, variants = read_blocks(refined)
    is_live, ends = teacher_is_live(params, parent.config), [block.parent_blocks.stop for block in replacements]
    stored = ends if is_live else _stored_boundaries(paths)
    compared = [end if end in stored else None for end in ends]
    assert compared[-1] is not None
    boundaries, sequences = [0, *(end for end in compared if end is not None)], course.sequences
    tokens = read_tokens(paths, "train", sequences) if is_live else None
    if tokens is None:
        train = _checksums("train", boundaries, sequences, paths)
    else:
        train = [[parent.digest, digest_of(tokens.numpy().tobytes().hex())]]
    digest = digest_of(
        {
            "settings": settings.model_dump(exclude={"teacher", "ranks", "sequences_per_batch", "offload"}),
            "run": params.run.model_dump(exclude={"workers"}),
            "child": refined.checksums,
            "train": train,
            "held_out": _checksums("calibration", [0, compared[-1]], held_out(params), paths),
            "steps": course.groups,
        }
    )
    return Material(refined, config, variants, compared, sequences.start, tokens, digest)


def _stored_boundaries(paths: Paths) -> list[int]:
    facts = Pieces(paths.activations, REBUILD).get(shard_name("train", 0))["facts"]
    stored: list[int] = facts["stored_boundaries"]
    return stored


def _checksums(split: str, boundaries: Sequence[int], sequences: range, paths: Paths) -> list[list[str]]:
    """Return the checksums of all files of the activation cache that hold some sequences at some boundaries."""
    readers = [BoundaryReader(paths.activations, split, boundary) for boundary in boundaries]
    return [reader.digest(sequences.start, sequences.stop) for reader in readers]


def head_of(paths: Paths, compute: Compute) -> Head:
    """Read the parent's final norm and LM head, which every child keeps."""
    parent = Parent(paths.parent)
    _, norm, lm_head = parent.outside(*compute)
    return Head(norm, lm_head, parent.config.rms_norm_eps)
