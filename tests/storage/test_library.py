"""The replacement library on disk: names, round trip, damage, index."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from storage.files import DamagedFileError, InputError, sha256
from storage.library import INDEX_SCHEMA, Library, channel_order_name, entry_name, whole_name
from storage.variants import Attention, Ffn
from tests.tiny import flip_byte

FACTS = {
    "first_block": 2,
    "span": 1,
    "weights": "decoupled",
    "loss": "cosine",
    "loss_before": 0.5,
    "loss_fitted": 0.375,
    "loss_after": 0.25,
    "tokens": 64,
}


def parsed(subblock: str, variant: str) -> Attention | Ffn:
    return Attention.parse(variant) if subblock == "attention" else Ffn.parse(variant)


def add(library: Library, subblock: str, variant: str) -> Path:
    name = entry_name(2, parsed(subblock, variant))
    path = library.write(name, {"mlp.up_proj.weight": torch.arange(6.0).view(2, 3).T.bfloat16()})
    library.pieces.finish(name, "key", [path], {**FACTS, "subblock": subblock, "variant": variant})
    return path


@pytest.mark.parametrize(
    ("subblock", "variant", "name", "file"),
    [
        ("attention", "kv_1", "block_002.kv_1", "block_002/kv_1.safetensors"),
        ("ffn", "ffn_768", "block_002.ffn_768", "block_002/ffn_768.safetensors"),
        ("attention", "linear", "block_002.attention_linear", "block_002/attention_linear.safetensors"),
        ("ffn", "linear", "block_002.ffn_linear", "block_002/ffn_linear.safetensors"),
    ],
)
def test_an_entrys_name_says_where_it_lies(subblock: str, variant: str, name: str, file: str, tmp_path: Path) -> None:
    assert entry_name(2, parsed(subblock, variant)) == name
    assert Library(tmp_path).path(name) == tmp_path / file


def test_a_span_lies_beside_the_blocks() -> None:
    library = Library(Path("library"))
    assert entry_name(2, Attention("linear"), 3) == "span_002_3.attention_linear"
    assert library.path(whole_name(2, 3)) == Path("library/span_002_3/whole.safetensors")
    assert channel_order_name(2, 3) == "span_002_3.channel_order"


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    library = Library(tmp_path)
    path = add(library, "ffn", "ffn_8")
    tensors_read = library.read("block_002.ffn_8")
    assert tensors_read["mlp.up_proj.weight"].dtype == torch.bfloat16
    assert tensors_read["mlp.up_proj.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert library.checksum("block_002.ffn_8") == sha256(path)


@pytest.mark.parametrize("position", [20, -1])
def test_a_flipped_byte_names_file_and_command(position: int, tmp_path: Path) -> None:
    library = Library(tmp_path)
    flip_byte(add(library, "ffn", "ffn_8"), position)
    with pytest.raises(DamagedFileError, match=r"block_002/ffn_8.safetensors is damaged.*dvc repro distill_blocks"):
        library.read("block_002.ffn_8")


def test_an_entry_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    add(Library(tmp_path), "ffn", "ffn_8")
    with pytest.raises(InputError, match=r"no piece 'block_003.kv_1' .*dvc repro distill_blocks"):
        Library(tmp_path).read("block_003.kv_1")


def test_the_index_has_a_row_per_variant(tmp_path: Path) -> None:
    library = Library(tmp_path)
    add(library, "ffn", "ffn_8")
    path = add(library, "attention", "kv_1")
    order = library.write(channel_order_name(2), {"order": torch.arange(3)})
    library.pieces.finish(channel_order_name(2), "key", [order])
    library.write_index()
    table = pq.read_table(library.index_path)
    assert table.schema.equals(INDEX_SCHEMA)
    assert [row["variant"] for row in table.to_pylist()] == ["ffn_8", "kv_1"], "the channel order is no variant"
    assert table.to_pylist()[1] == {
        **FACTS,
        "subblock": "attention",
        "variant": "kv_1",
        "file": "block_002/kv_1.safetensors",
        "sha256": sha256(path),
    }


def test_an_index_with_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    library = Library(tmp_path)
    path = library.write("block_002.kv_1", {"a": torch.ones(1)})
    facts = {**FACTS, "subblock": "attention", "variant": "kv_1", "weights": "initial", "loss_after": float("nan")}
    library.pieces.finish("block_002.kv_1", "key", [path], facts)
    library.write_index()
    [row] = pq.read_table(library.index_path).to_pylist()
    assert row["loss_after"] != row["loss_after"]
