"""The parent of a search: its blocks as replacements, and its geometry where that is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from storage.files import InputError
from storage.model_config import ModelConfig
from storage.parent_info import read_parent_info
from storage.paths import Paths
from storage.records import CostRow, ScoreRow
from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.search_space import parent_blocks

_UNNAMED = "the parent"


@dataclass(frozen=True)
class ParentFacts:
    """The parent of a search; `config` is None for a user's tables that come without one."""

    name: str
    digest: str
    blocks: tuple[Replacement, ...]
    config: ModelConfig | None

    @classmethod
    def read(cls, paths: Paths) -> Self:
        """Read the parent that prepare_parent made.

        Raises:
            InputError: puzzle_parent.json is missing or damaged.
        """
        info = read_parent_info(paths.parent)
        return cls(info.name, info.digest, parent_blocks(info.config), info.config)

    @classmethod
    def from_tables(cls, scores: Sequence[ScoreRow], costs: Sequence[CostRow], config: ModelConfig | None) -> Self:
        """Make the parent that a user's tables belong to; without a config, its variants are the largest in the costs.

        Raises:
            InputError: the costs have no attention or no FFN.
        """
        if config is not None:
            return cls(_UNNAMED, "", parent_blocks(config), config)
        attention = Attention.parse(_largest_variant("attention", costs))
        ffn = Ffn.parse(_largest_variant("ffn", costs))
        num_blocks = max(row.first_block + row.span for row in scores)
        return cls(_UNNAMED, "", tuple(Replacement(index, 1, attention, ffn) for index in range(num_blocks)), None)


def _largest_variant(component: str, costs: Sequence[CostRow]) -> str:
    sizes = {row.variant: row.params for row in costs if row.component == component}
    if not sizes:
        raise InputError(f"the cost table has no rows of component {component}; a child cannot be costed")
    return max(sizes, key=lambda variant: (sizes[variant], variant))
