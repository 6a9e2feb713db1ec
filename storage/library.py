"""The replacement library: trained weights of every variant, one safetensors each, and index.parquet.

`block_<i>/kv_<heads>.safetensors`, `block_<i>/ffn_<channels>.safetensors` hold a subblock's tensors under the names of
a Llama layer (linear ones are `attention_linear`, `ffn_linear`). `block_<i>/channel_order.safetensors` ranks the FFN's
channels: the initial weights of a narrower FFN are that slice of the parent. `span_<i>_<n>/` holds the same for a child
block in place of n parent blocks, and `whole.safetensors`, the block of the parent's own kind whose subblocks its
variants are trained beside. The index tells the losses before and after training.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage.files import DamagedFileError, InputError, write_whole
from storage.parquet_files import write_table
from storage.pieces import Pieces, verify
from storage.variants import Attention, Ffn, Replacement

FORMAT_VERSION = 4
REBUILD = "dvc repro distill_blocks"
WHOLE = "whole"

INDEX_SCHEMA = pa.schema(
    [
        pa.field("first_block", pa.int32(), nullable=False),
        pa.field("span", pa.int32(), nullable=False),
        pa.field("subblock", pa.string(), nullable=False),  # attention, ffn; whole: both, of a span
        pa.field("variant", pa.string(), nullable=False),
        pa.field("weights", pa.string(), nullable=False),  # decoupled, or initial where training did not improve
        pa.field("loss", pa.string(), nullable=False),  # which one (tasks/puzzle/distill/losses.py), on held-out tokens
        pa.field("loss_before", pa.float64(), nullable=False),
        pa.field("loss_fitted", pa.float64(), nullable=False),  # of the closed-form start
        pa.field("loss_after", pa.float64(), nullable=False),  # of the weights that are kept; of training's end if none
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


def subblock_of(variant: Attention | Ffn) -> str:
    """Return the subblock that a variant is for: `attention` or `ffn`."""
    return "attention" if isinstance(variant, Attention) else "ffn"


def entry_name(first_block: int, variant: Attention | Ffn, span: int = 1) -> str:
    """Return the name of an entry's piece: `block_007.ffn_768`, `block_007.attention_linear`, `span_007_2.kv_1`."""
    return f"{_place(first_block, span)}.{name_of(variant)}"


def name_of(variant: Attention | Ffn) -> str:
    """Return the name of a variant within its block: `kv_1`, `ffn_768`, `attention_linear`."""
    return variant.name if variant.name[-1].isdigit() else f"{subblock_of(variant)}_{variant.name}"


def refuse_unknown(names: Iterable[str], variants: Iterable[Attention | Ffn]) -> None:
    """Check the names in distill_blocks.variant_tokens.

    Raises:
        InputError: a name is neither a variant's nor `whole`.
    """
    library_names = [*map(name_of, variants), WHOLE]
    for name in names:
        if name not in library_names:
            raise InputError(
                f"distill_blocks.variant_tokens names {name!r}, the library has {', '.join(library_names)}"
            )


def whole_name(first_block: int, span: int) -> str:
    """Return the name of the piece that holds a span's block of the parent's own kind, both subblocks trained."""
    return f"{_place(first_block, span)}.{WHOLE}"


def channel_order_name(first_block: int, span: int = 1) -> str:
    """Return the name of the piece that ranks the FFN channels of a block, or of a span's whole block."""
    return f"{_place(first_block, span)}.channel_order"


def _place(first_block: int, span: int) -> str:
    return f"block_{first_block:03d}" if span == 1 else f"span_{first_block:03d}_{span}"


@dataclass(frozen=True)
class Library:
    """The library in `folder`."""

    folder: Path

    @property
    def pieces(self) -> Pieces:
        """Return the finished pieces: an entry each, or an order of channels."""
        return Pieces(self.folder, REBUILD)

    @property
    def index_path(self) -> Path:
        """Return the file of the index, which has a row per entry."""
        return self.pieces.home / "index.parquet"

    def path(self, name: str) -> Path:
        """Return the file that holds the tensors of a piece."""
        block, _, entry = name.partition(".")
        return self.folder / block / f"{entry}.safetensors"

    def write(self, name: str, tensors: dict[str, Tensor]) -> Path:
        """Write an entry's tensors; the caller records the piece."""
        with write_whole(self.path(name)) as temporary:
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, temporary)
        return self.path(name)

    def checksum(self, name: str) -> str:
        """Return the sha256 of an entry's file, from its record; rows of scores name the weights by it."""
        files: dict[str, str] = self.pieces.get(name)["files"]
        return files[str(self.path(name).relative_to(self.folder))]

    def start_of(self, first_block: int, span: int) -> int:
        """Return the index of the parent's block that a replacement's initial weights come from."""
        return first_block if span == 1 else int(self.pieces.get(whole_name(first_block, span))["facts"]["start"])

    def read(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of an entry and verify them.

        Raises:
            InputError: the library has no such entry.
            DamagedFileError: its bytes differ from those that were written.
        """
        path = self.path(name)
        verify(path, self.checksum(name), REBUILD)
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except SafetensorError as error:
            raise DamagedFileError(f"{path} is not a whole safetensors file ({error}); run `{REBUILD}`") from error
        return tensors

    def prefetch(self, replacements: Iterable[Replacement]) -> None:
        """Begin to bring the weights of replacements that will be read soon, in their order, if they are far away."""
        places = ((replacement, replacement.first_block, replacement.span) for replacement in replacements)
        self.pieces.prefetch(
            name
            for replacement, first, span in places
            for name in (
                whole_name(first, span),
                entry_name(first, replacement.attention, span),
                entry_name(first, replacement.ffn, span),
            )
        )

    def write_index(self) -> None:
        """Write index.parquet from the records of all entries, in order of block and variant."""
        rows = []
        for name in self.pieces.names():
            record = self.pieces.get(name)
            for file, checksum in record["files"].items():
                if "variant" in record["facts"]:
                    facts = {key: value for key, value in record["facts"].items() if key in INDEX_SCHEMA.names}
                    rows.append({**facts, "file": file, "sha256": checksum})
        write_table(self.index_path, pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))
