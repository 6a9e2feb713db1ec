"""The possible blocks of a child: variants of a subblock, replacements of parent blocks, architectures.

Words are METHOD.md's: a *variant* is one alternative for a subblock (attention or FFN); a *replacement* puts one
attention and one FFN variant in place of `span` consecutive parent blocks; an *architecture* covers the parent's
blocks exactly once, in order.
"""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from storage.files import InputError, digest_of

AttentionKind = Literal["gqa", "linear", "no_op"]
FfnKind = Literal["gated", "linear", "no_op"]


@dataclass(frozen=True, order=True)
class Attention:
    """Attention variant: grouped-query attention with `num_kv_heads`, one linear layer, or nothing."""

    kind: AttentionKind
    num_kv_heads: int = 0

    def __post_init__(self) -> None:
        assert (self.kind == "gqa") == (self.num_kv_heads > 0), self

    @property
    def name(self) -> str:
        """Return `kv_3`, `linear` or `no_op`."""
        return f"kv_{self.num_kv_heads}" if self.kind == "gqa" else self.kind

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the variant that `name` names."""
        if match := re.fullmatch(r"kv_([1-9][0-9]{0,8})", name):
            return cls("gqa", int(match[1]))
        if name == "linear" or name == "no_op":
            return cls("linear" if name == "linear" else "no_op")
        raise InputError(f"unknown attention variant {reprlib.repr(name)}: expected kv_<heads>, linear or no_op")


@dataclass(frozen=True, order=True)
class Ffn:
    """FFN variant: gated FFN with `intermediate_size` channels, one linear layer, or nothing."""

    kind: FfnKind
    intermediate_size: int = 0

    def __post_init__(self) -> None:
        assert (self.kind == "gated") == (self.intermediate_size > 0), self

    @property
    def name(self) -> str:
        """Return `ffn_1536`, `linear` or `no_op`."""
        return f"ffn_{self.intermediate_size}" if self.kind == "gated" else self.kind

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the variant that `name` names."""
        if match := re.fullmatch(r"ffn_([1-9][0-9]{0,8})", name):
            return cls("gated", int(match[1]))
        if name == "linear" or name == "no_op":
            return cls("linear" if name == "linear" else "no_op")
        raise InputError(f"unknown FFN variant {reprlib.repr(name)}: expected ffn_<channels>, linear or no_op")


@dataclass(frozen=True, order=True)
class Replacement:
    """One child block in place of parent blocks `first_block` .. `first_block + span - 1`."""

    first_block: int
    span: int
    attention: Attention
    ffn: Ffn

    @property
    def parent_blocks(self) -> range:
        """Return the parent blocks that this one stands for."""
        return range(self.first_block, self.first_block + self.span)

    @property
    def name(self) -> str:
        """Return the name in messages and progress: `block 7: kv_1 + ffn_768`, `blocks 7-8: ...`."""
        where = f"block {self.first_block}" if self.span == 1 else f"blocks {self.first_block}-{self.parent_blocks[-1]}"
        return f"{where}: {self.attention.name} + {self.ffn.name}"


@dataclass(frozen=True)
class Architecture:
    """A child: replacements in order that cover the parent's blocks exactly once."""

    blocks: tuple[Replacement, ...]

    def __post_init__(self) -> None:
        covered = [index for block in self.blocks for index in block.parent_blocks]
        if covered != list(range(len(covered))) or not covered:
            raise InputError(f"an architecture must cover the parent's blocks once and in order, found {covered}")

    @property
    def digest(self) -> str:
        """Return the architecture's content hash."""
        return digest_of(self.to_json())

    def to_json(self) -> list[dict[str, Any]]:
        """Return the `blocks` list of architecture.json."""
        return [
            {
                "parent_blocks": list(block.parent_blocks),
                "attention": {"kind": block.attention.kind, "num_kv_heads": block.attention.num_kv_heads},
                "ffn": {"kind": block.ffn.kind, "intermediate_size": block.ffn.intermediate_size},
            }
            for block in self.blocks
        ]

    @classmethod
    def from_json(cls, blocks: list[Mapping[str, Any]]) -> Self:
        """Invert :meth:`to_json`.

        Raises:
            InputError: a block lacks a field, names an unknown kind, or the cover has gaps.
        """
        try:
            return cls(
                tuple(
                    Replacement(
                        block["parent_blocks"][0],
                        len(block["parent_blocks"]),
                        Attention(block["attention"]["kind"], block["attention"]["num_kv_heads"]),
                        Ffn(block["ffn"]["kind"], block["ffn"]["intermediate_size"]),
                    )
                    for block in blocks
                )
            )
        except (KeyError, IndexError, TypeError, AssertionError) as error:
            raise InputError(f"architecture.json: not a list of blocks in our form ({error!r})") from error
