"""refine.json, the whole-child correction of a child, block by block. No torch.

refine_child writes it, the report draws it. An error is the mean over held-out tokens of |parent's state - child's|^2 /
|parent's|^2: 0 where both are equal, 1 where the child has nothing of the parent's state.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from storage.files import write_sealed
from storage.json_records import read_record
from storage.paths import Paths

SubblockName = Literal["attention", "ffn"]


@dataclass(frozen=True)
class SubblockRefinement:
    """The correction of one subblock.

    Attributes:
        subblock: the one that was corrected.
        ridge: strength of the ridge that was chosen; None if the weights stayed as they were.
        error_before: error behind the subblock, with everything before it corrected.
        error_after: the same with the weights that are kept; never above `error_before`.
    """

    subblock: SubblockName
    ridge: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True)
class BlockRefinement:
    """One block of the child.

    Attributes:
        first_block: parent block that it stands for, the first one of a span.
        span: number of parent blocks that it stands for.
        subblocks: its corrections, in order; empty where nothing was to correct.
        error_assembled: error behind the block in the child as assembled.
        error_refined: error behind the block in the corrected child.
    """

    first_block: int
    span: int
    subblocks: tuple[SubblockRefinement, ...]
    error_assembled: float
    error_refined: float


@dataclass(frozen=True)
class Refinement:
    """The correction of one target's child: tokens of the fits, tokens that chose the ridges, and every block."""

    target: str
    tokens: int
    held_out_tokens: int
    blocks: tuple[BlockRefinement, ...]


def read_refinement(target: str, paths: Paths) -> Refinement:
    """Read the refine.json of a target.

    Raises:
        InputError: it is missing.
        DamagedFileError: it is not what was written, or a field is missing or has the wrong type.
    """
    return read_record(paths.refinement(target), Refinement, f"dvc repro refine_child@{target}")


def write_refinement(path: Path, refinement: Refinement) -> None:
    """Write refine.json."""
    write_sealed(path, asdict(refinement))
