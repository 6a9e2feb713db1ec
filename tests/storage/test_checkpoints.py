"""Checkpoints: written by us, by transformers and safetensors; and every fault in them is named."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from storage import checkpoints
from storage.checkpoints import CHECKSUMS, Checkpoint, CheckpointWriter, tensor_sha256
from storage.files import DamagedFileError, InputError, write_sealed
from tests.clone import ROOT
from tests.tiny import FAMILIES, flip_byte, save_tiny, tiny_model

CPU = torch.device("cpu")
REBUILD = "dvc repro it"
INDEX = "model.safetensors.index.json"


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(50, 8, generator=generator).bfloat16(),
        "model.layers.1.mlp.down_proj.weight": torch.randn(8, 12, generator=generator),
        "model.layers.1.input_layernorm.weight": torch.randn(8, generator=generator),
        "model.layers.10.input_layernorm.weight": torch.randn(8, generator=generator).half(),
        "scale": torch.tensor(3.5),
    }


def write(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 1 << 30) -> Checkpoint:
    writer = CheckpointWriter(folder, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add({name: tensor})
    writer.finish()
    return Checkpoint(folder, REBUILD)


@pytest.mark.parametrize(("max_shard_bytes", "shards"), [(1 << 30, 1), (900, 2), (1, 5)])
def test_what_is_written_is_read_back(max_shard_bytes: int, shards: int, tmp_path: Path) -> None:
    tensors = some_tensors()
    checkpoint = write(tmp_path, tensors, max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    assert (tmp_path / INDEX).is_file() == (shards > 1)
    assert set(checkpoint.files) == set(tensors)
    for name, tensor in tensors.items():
        read_back = checkpoint.tensor(name)
        assert read_back.dtype == tensor.dtype
        assert torch.equal(read_back, tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.checksums[name] == tensor_sha256(tensor)


def test_a_tensor_that_was_read_keeps_no_file_mapped(tmp_path: Path) -> None:
    """Where memory is limited, what is mapped counts: blocks that are held would keep a large parent's files."""
    checkpoint = write(tmp_path, some_tensors())
    held = [checkpoint.tensor(name) for name in checkpoint.files]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len(held) == 5


def test_shards_have_the_names_that_other_tools_expect(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), 900)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CHECKSUMS, INDEX, *names])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in some_tensors().values())
    assert set(index["weight_map"].values()) == set(names)


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 20_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_write(family: str, max_shard_bytes: int, tmp_path: Path) -> None:
    model, config = save_tiny(family, tmp_path / "theirs")
    theirs = Checkpoint(tmp_path / "theirs", REBUILD, is_foreign=True)
    assert ("lm_head.weight" in theirs.files) != config.tie_embeddings
    write(tmp_path / "ours", {name: theirs.tensor(name) for name in theirs.files}, max_shard_bytes)
    (tmp_path / "ours" / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_one_tensor_under_two_names_is_written_twice(tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory; a tied model's state dict has such a pair."""
    model = tiny_model("llama")
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    checkpoint = write(tmp_path, state)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.embed_tokens.weight"))


def test_slices_and_transposes_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"rows": whole[1:3], "columns": whole[:, ::2], "transposed": whole.T, "whole": whole}
    checkpoint = write(tmp_path, tensors)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_block_is_read_under_its_own_names(tmp_path: Path) -> None:
    tensors = some_tensors()
    block = write(tmp_path, tensors, 1).block(1, CPU, torch.bfloat16)
    assert set(block) == {"mlp.down_proj.weight", "input_layernorm.weight"}, "block 10 is another"
    expected = tensors["model.layers.1.mlp.down_proj.weight"].bfloat16()
    assert torch.equal(block["mlp.down_proj.weight"], expected)


def test_a_blocks_digest_follows_its_own_tensors_only(tmp_path: Path) -> None:
    tensors = some_tensors()
    before = write(tmp_path / "a", tensors)
    changed = {**tensors, "model.layers.1.input_layernorm.weight": torch.zeros(8)}
    after = write(tmp_path / "b", changed, 1)
    assert before.block_digest(1) != after.block_digest(1)
    assert before.block_digest(10) == after.block_digest(10)


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 1])
def test_a_flipped_byte_names_file_tensor_and_command(max_shard_bytes: int, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, some_tensors(), max_shard_bytes)
    name = "model.layers.1.mlp.down_proj.weight"
    file = checkpoint.files[name]
    marked = checkpoint.tensor(name).numpy().tobytes()
    flip_byte(file, file.read_bytes().index(marked) + 17)
    again = Checkpoint(tmp_path, REBUILD)
    with pytest.raises(DamagedFileError) as caught:
        again.tensor(name)
    for part in (str(file), name, f"run `{REBUILD}`"):
        assert part in str(caught.value)
    again.tensor("model.embed_tokens.weight")  # the others are whole


def test_a_tensor_is_hashed_once_until_somebody_writes_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, long_ago = write(tmp_path, some_tensors()), time.time() - 60
    os.utime(checkpoint.files["scale"], (long_ago, long_ago))
    before = checkpoint.tensor("scale")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "tensor_sha256", lambda _: "another")
        assert torch.equal(Checkpoint(tmp_path, REBUILD).tensor("scale"), before)
        with pytest.raises(DamagedFileError):
            checkpoint.tensor("model.embed_tokens.weight")
    flip_byte(checkpoint.files["scale"])
    with pytest.raises(DamagedFileError):
        _ = [checkpoint.tensor(name) for name in checkpoint.files]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_names_file_and_command(keep: int, tmp_path: Path) -> None:
    write(tmp_path, some_tensors())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFileError, match=r"model.safetensors is not a whole safetensors file .*dvc repro it"):
        Checkpoint(tmp_path, REBUILD).tensor("scale")


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), 900)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"model-00002-of-00002.safetensors is missing; run `dvc repro it`"):
        Checkpoint(tmp_path, REBUILD).tensor("model.embed_tokens.weight")


def test_an_index_that_names_an_absent_tensor_is_found(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), 900)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.layers.2.absent"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        DamagedFileError, match=r"model-00001-of-00002.safetensors lacks .*layers.2.absent.*dvc repro it"
    ):
        Checkpoint(tmp_path, REBUILD).tensor("model.embed_tokens.weight")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', "null"])
def test_an_index_that_is_no_index_is_found(text: str, tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), 900)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(DamagedFileError, match=r"model.safetensors.index.json .*dvc repro it"):
        Checkpoint(tmp_path, REBUILD).tensor("model.embed_tokens.weight")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tensor lm_head.weight; run `dvc repro it`"):
        write(tmp_path, some_tensors()).tensor("lm_head.weight")


def test_an_empty_folder_and_pickled_weights_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has neither model.safetensors nor .*index.json; run `dvc repro it`"):
        Checkpoint(tmp_path, REBUILD).tensor("x")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pickled .bin weights are not read: convert them to safetensors"):
        Checkpoint(tmp_path, REBUILD).tensor("x")


def test_a_foreign_checkpoint_has_no_checksums(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, REBUILD, is_foreign=True)
    assert checkpoint.checksums == {}
    assert torch.equal(checkpoint.tensor("a"), torch.ones(3))


@pytest.mark.parametrize("name", ["", ".", "../other", "/etc/hostname"])
def test_a_list_of_files_elsewhere_is_damaged(name: str, tmp_path: Path) -> None:
    """The message is about the list; such a name once was a file that "is missing"."""
    write_sealed(tmp_path / CHECKSUMS, {"tensors": {}, "files": {name: "0"}})
    with pytest.raises(DamagedFileError, match=f"{CHECKSUMS} lists .*, which is no file of its folder; run"):
        Checkpoint(tmp_path, REBUILD).verify_files()


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder, some_tensors(), 900)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_later_changes_of_an_added_tensor_do_not_reach_the_file(tmp_path: Path) -> None:
    writer, tensor = CheckpointWriter(tmp_path, 1 << 30), torch.ones(4)
    writer.add({"a": tensor})
    tensor.zero_()
    writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(4))
    assert Checkpoint(tmp_path, REBUILD).checksums == {"a": tensor_sha256(torch.ones(4))}


def test_files_are_compared_where_python_takes_assertions_out(tmp_path: Path) -> None:
    """With PYTHONOPTIMIZE set, an assert compares nothing."""
    writer = CheckpointWriter(tmp_path, 1 << 20)
    writer.add({"a": torch.ones(1)})
    (tmp_path / "tokenizer.json").write_text("{}")
    writer.finish()
    flip_byte(tmp_path / "tokenizer.json")
    code = f"from storage.checkpoints import *; Checkpoint(Path({str(tmp_path)!r}), 'dvc repro it').verify_files()"
    ended = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "DamagedFileError" in ended.stderr and "tokenizer.json is damaged" in ended.stderr
