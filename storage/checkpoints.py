"""Safetensors checkpoints in the Hugging Face layout, read and written tensor by tensor, never as a whole.

A checkpoint that this project wrote carries `checksums.json` {tensor name: sha256 of its bytes}; its tensors are
compared with it as they are read, so a flipped byte is found by the stage that would have used it.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.files import DamagedFileError, InputError, digest_of, read_json, write_json, write_whole
from storage.model_config import ModelConfig, from_nemotron_nas
from storage.records import Attention, Ffn

CHECKSUMS = "checksums.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DERIVED = ".rotary_emb.inv_freq"


def tensor_sha256(tensor: Tensor) -> str:
    """Hex sha256 of a CPU tensor's bytes."""
    flat = tensor.contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A folder with one safetensors file, or several and their index; `rebuild` is the command that makes it."""

    folder: Path
    rebuild: str

    @functools.cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it; rotary frequencies, which older ones keep, follow from config.json.

        Raises:
            InputError: no safetensors in the folder.
            DamagedFileError: a file is missing, truncated, or lacks a tensor that the index names.
        """
        if (self.folder / _INDEX).is_file():
            index = read_json(self.folder / _INDEX, self.rebuild)
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(weight_map, dict):
                raise DamagedFileError(f"{self.folder / _INDEX} holds no weight_map; run `{self.rebuild}`")
            found = {str(name): self.folder / str(file) for name, file in weight_map.items()}
        elif (self.folder / _SINGLE).is_file():
            with self._open(self.folder / _SINGLE) as handle:
                found = dict.fromkeys(handle.keys(), self.folder / _SINGLE)
        else:
            pickled = any(self.folder.glob("*.bin"))
            hint = " (pickled .bin weights are not read: convert them to safetensors)" if pickled else ""
            raise InputError(f"{self.folder} has neither {_SINGLE} nor {_INDEX}{hint}; run `{self.rebuild}`")
        for file in sorted(set(found.values())):
            with self._open(file) as handle:
                lacking = {name for name, place in found.items() if place == file} - set(handle.keys())
            if lacking:
                raise DamagedFileError(
                    f"{file} lacks tensors that {_INDEX} names: {sorted(lacking)[:3]}; run `{self.rebuild}`"
                )
        return {name: file for name, file in found.items() if not name.endswith(_DERIVED)}

    @functools.cached_property
    def checksums(self) -> dict[str, str]:
        """Tensor name -> sha256, empty for a checkpoint that others wrote."""
        if not (self.folder / CHECKSUMS).is_file():
            return {}
        checksums: dict[str, str] = read_json(self.folder / CHECKSUMS, self.rebuild)
        return checksums

    def _open(self, file: Path) -> safe_open:
        if not file.is_file():
            raise DamagedFileError(f"{file} is missing; run `{self.rebuild}`")
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(f"{file} is not a whole safetensors file ({error}); run `{self.rebuild}`") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        with self._open(self.files[name]) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor and compare it with its checksum.

        Raises:
            InputError: the checkpoint has no such tensor.
            DamagedFileError: its bytes differ from those that were written.
        """
        if name not in self.files:
            raise InputError(f"{self.folder} has no tensor {name}; run `{self.rebuild}`")
        with self._open(self.files[name]) as handle:
            tensor: Tensor = handle.get_tensor(name).clone()  # else it keeps the whole file mapped
        if name in self.checksums and tensor_sha256(tensor) != self.checksums[name]:
            raise DamagedFileError(
                f"{self.files[name]}: tensor {name} is damaged (sha256 differs); run `{self.rebuild}`"
            )
        return tensor

    def block_names(self, block_index: int) -> dict[str, str]:
        """Names of a block's tensors within the block -> in the checkpoint."""
        prefix = f"model.layers.{block_index}."
        return {name.removeprefix(prefix): name for name in self.files if name.startswith(prefix)}

    def block(self, block_index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors of one block, named as within a Llama layer."""
        names = self.block_names(block_index)
        return {short: self.tensor(name).to(device, dtype) for short, name in names.items()}

    def block_digest(self, block_index: int) -> str:
        """Content digest of one block, from the checksums."""
        return digest_of({short: self.checksums[name] for short, name in self.block_names(block_index).items()})


def read_blocks(child: Checkpoint) -> tuple[ModelConfig, list[tuple[Attention, Ffn]]]:
    """Geometry and blocks of a child's checkpoint, from its config.json."""
    path = child.folder / "config.json"
    return from_nemotron_nas(read_json(path, child.rebuild), str(path))


@dataclass
class CheckpointWriter:
    """Writes tensors in shards of bounded size; the index and the checksums come last.

    Use: `add` tensors in order, then `finish`. Peak memory is one shard.
    """

    folder: Path
    max_shard_bytes: int
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _shards: list[tuple[Path, list[str]]] = field(default_factory=list)
    _checksums: dict[str, str] = field(default_factory=dict)
    _total_bytes: int = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors; a full shard goes to disk."""
        for name, tensor in tensors.items():
            assert name not in self._checksums, name
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self.max_shard_bytes:
                self._flush()
            # a copy, since safetensors refuses tensors that share memory (tied ones, slices)
            self._pending[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            self._pending_bytes += size
            self._checksums[name] = tensor_sha256(self._pending[name])

    def _flush(self) -> None:
        path = self.folder / f"model-{len(self._shards) + 1:05d}.safetensors"
        with write_whole(path) as temporary:
            save_file(self._pending, temporary, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Give the shards their final names and write index and checksums; one shard needs no index."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = _SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.replace(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            with write_whole(self.folder / _INDEX) as temporary:
                temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_json(self.folder / CHECKSUMS, self._checksums)
