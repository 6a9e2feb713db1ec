"""Safetensors checkpoints in the Hugging Face layout, read and written tensor by tensor, never as a whole.

Which file counts is what transformers takes: model.safetensors, also where an index and its shards lie beside it.
A checkpoint that this project wrote carries `checksums.json`: the sha256 of every tensor, and of every other file in
the folder. Tensors are compared with it as they are read, the other files before the first tensor, so the stage that
would use a flipped byte refuses it.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storage.files import (
    SEAL,
    FileState,
    InputError,
    damaged,
    digest_of,
    sha256,
    to_run,
    verify,
    write_sealed,
    write_whole,
)
from storage.json_files import read_object
from storage.json_records import read_record
from storage.model_config import EMBEDDING, ModelConfig
from storage.nemotron_nas import from_nemotron_nas
from storage.side_files import check_inside
from storage.variants import Attention, Ffn

CHECKSUMS = "checksums.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_MAX_INDEX_BYTES = 64 << 20
_VERIFIED = set[tuple[FileState, str, str | None]]()
"""Tensors that this process has verified: the state of the file, the name, the checksum."""


def tensor_sha256(tensor: Tensor) -> str:
    """Return the hex sha256 of a CPU tensor's bytes."""
    flat = tensor.contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def placed(tensor: Tensor, device: torch.device, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
    """Bring a CPU tensor to a device and a dtype, to a GPU from pinned memory without waiting for the copy.

    On a CPU the result may share the tensor's memory, unless `copy` forbids it.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True).to(dtype)
    return tensor.to(device, dtype, copy=copy)


@dataclass(frozen=True)
class Checksums:
    """The content of checksums.json: sha256 of tensors by name, and of the other files of the folder by theirs."""

    tensors: dict[str, str]
    files: dict[str, str]


@dataclass(frozen=True)
class TensorHeader:
    """A safetensors file's entry on a tensor: the file, the type by safetensors' name (such as BF16), the shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with one safetensors file, or several and their index.

    Attributes:
        folder: the checkpoint.
        rebuild: the command that makes it.
        is_foreign: whether others may have made or changed it: checksums.json need not be there.
    """

    folder: Path
    rebuild: str
    is_foreign: bool = False

    @functools.cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Return name -> header of all tensors of the files, without rotary frequencies, which older checkpoints hold.

        Raises:
            InputError: no safetensors in the folder, or the index names a file outside of it.
            DamagedFileError: a file is missing or truncated, or holds other tensors than the index says.
        """
        weight_map = None if (self.folder / _SINGLE).is_file() else self._weight_map()
        headers: dict[str, TensorHeader] = {}
        for file in [self.folder / _SINGLE] if weight_map is None else sorted(set(weight_map.values())):
            if file.exists():
                check_inside(file, self.folder)
            with self._open(file) as handle:
                names = [name for name in list(handle.keys()) if not _DERIVED.fullmatch(name)]
                parts = {name: handle.get_slice(name) for name in names}
                held = {
                    name: TensorHeader(file, parts[name].get_dtype(), tuple(parts[name].get_shape())) for name in names
                }
            if weight_map is not None:
                named = {name for name, place in weight_map.items() if place == file and not _DERIVED.fullmatch(name)}
                self._compare(file, named, held.keys())
            headers |= held
        return {name: headers[name] for name in weight_map or headers if name in headers}

    def _weight_map(self) -> dict[str, Path]:
        """Return tensor name -> file, as the index has it."""
        path = self.folder / _INDEX
        if not path.is_file():
            pickled = any(self.folder.glob("*.bin"))
            hint = " (pickled .bin weights are not read: convert them to safetensors)" if pickled else ""
            raise InputError(f"{self.folder} has neither {_SINGLE} nor {_INDEX}{hint}; {to_run(self.rebuild)}")
        check_inside(path, self.folder)
        weight_map = read_object(path, self.rebuild, _MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise damaged(path, "holds no weight_map of names", self.rebuild)
        for name in set(weight_map.values()):
            if not name or "\0" in name or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise InputError(
                    f"{path} names {name!r:.80}, which is no file in {self.folder}; {to_run(self.rebuild)}"
                )
        return {name: self.folder / file for name, file in weight_map.items()}

    def _compare(self, file: Path, named: Set[str], held: Set[str]) -> None:
        """Raise DamagedFileError where a file holds other tensors than the index says."""
        lacking, unnamed = sorted(named - held)[:3], sorted(held - named)[:3]
        if lacking:
            raise damaged(file, f"lacks tensors that {_INDEX} names: {lacking}", self.rebuild)
        if unnamed:
            raise damaged(file, f"holds tensors that {_INDEX} lacks or has in another file: {unnamed}", self.rebuild)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type that the checkpoint is written in anew: the embedding's, as config.json has it.

        Where that is float16 and another tensor is not, it is float32, since float16 ends at 65,504.
        """
        held = {header.dtype for header in self.headers.values()}
        of_embedding = self.headers[EMBEDDING].dtype
        return _DTYPES["F32" if of_embedding == "F16" and held != {"F16"} else of_embedding]

    @functools.cached_property
    def files(self) -> dict[str, Path]:
        """Return tensor name -> the file that holds it; errors as of `headers`."""
        return {name: header.file for name, header in self.headers.items()}

    @functools.cached_property
    def _recorded(self) -> Checksums:
        """Return the content of checksums.json, once the files beside the tensors were compared with it.

        Raises:
            DamagedFileError: checksums.json is missing or damaged, or a file that it lists is, of a checkpoint of ours.
        """
        path = self.folder / CHECKSUMS
        if self.is_foreign and not (path.is_file() and f'"{SEAL}"'.encode() in path.read_bytes()):
            return Checksums({}, {})
        if self.folder.is_dir() and not path.is_file():
            raise damaged(path, "is missing although every checkpoint has one", self.rebuild)
        checksums = read_record(path, Checksums, self.rebuild)
        if not self.is_foreign:
            for name, checksum in checksums.files.items():
                if not (parts := Path(name).parts) or parts[0] == "/" or ".." in parts:
                    raise damaged(path, f"lists {name!r:.100}, which is no file of its folder", self.rebuild)
                verify(self.folder / name, checksum, self.rebuild)
        return checksums

    @property
    def checksums(self) -> dict[str, str]:
        """Return tensor name -> sha256; empty if others wrote the checkpoint. Raises DamagedFileError as `tensor`."""
        return self._recorded.tensors

    def verify_files(self) -> None:
        """Compare the files beside the tensors with their checksums; raises DamagedFileError."""
        _ = self._recorded

    def config_json(self) -> dict[str, Any]:
        """Return the content of config.json, compared with its checksum."""
        self.verify_files()
        return read_object(self.folder / "config.json", self.rebuild)

    def _present(self, file: Path) -> Path:
        """Return a file that is there; raises DamagedFileError."""
        if not file.is_file():
            raise damaged(file, "is missing", self.rebuild)
        return file

    def _open(self, file: Path) -> safe_open:
        self._present(file)
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise damaged(file, f"is not a whole safetensors file ({error})", self.rebuild) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        return self.headers[name].shape

    def rows(self, name: str, part: slice) -> Tensor:
        """Return some rows of a tensor, whose bytes are compared with nothing."""
        with self._open(self.files[name]) as handle:
            rows: Tensor = handle.get_slice(name)[part].clone()
        return rows

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; compare it with its checksum, once a process as long as nobody writes to its file.

        Raises:
            InputError: the checkpoint has no such tensor, or it holds NaN or an infinite value.
            DamagedFileError: its bytes differ from those that were written.
        """
        return self._mapped(name).clone()

    def _mapped(self, name: str) -> Tensor:
        """Return a verified tensor over the mapped file, which stays mapped as long as the tensor lives."""
        if name not in self.files:
            raise InputError(f"{self.folder} has no tensor {name}; {to_run(self.rebuild)}")
        state = FileState.of(self._present(self.files[name]))
        with self._open(self.files[name]) as handle:
            tensor: Tensor = handle.get_tensor(name)
        expected = self.checksums.get(name) if self.checksums else ""
        if (state, name, expected) not in _VERIFIED:
            self._verify(name, tensor, expected)
            if state.is_settled:
                _VERIFIED.add((state, name, expected))
        return tensor

    def _verify(self, name: str, tensor: Tensor, expected: str | None) -> None:
        """Compare a tensor with its checksum (None: it has none; empty: the checkpoint has none), and check it."""
        if expected != "" and tensor_sha256(tensor) != expected:
            raise damaged(self.files[name], f"is damaged: sha256 of tensor {name} differs", self.rebuild)
        if not _is_finite(tensor):
            raise InputError(
                f"{self.files[name]}: tensor {name} holds NaN or infinite values, expected finite weights; "
                f"{to_run(self.rebuild)}, or take another revision of this checkpoint"
            )

    def block_names(self, block_index: int) -> dict[str, str]:
        """Return the names of a block's tensors: name within the block -> name in the checkpoint."""
        prefix = f"model.layers.{block_index}."
        return {name.removeprefix(prefix): name for name in self.files if name.startswith(prefix)}

    def block(self, block_index: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all tensors of one block, named as within a Llama layer."""
        names = self.block_names(block_index)
        return {short: placed(self._mapped(name), device, dtype, copy=True) for short, name in names.items()}

    def block_digest(self, block_index: int) -> str:
        """Return the content digest of one block, from the checksums."""
        return digest_of({short: self.checksums[name] for short, name in self.block_names(block_index).items()})


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether no value is NaN or infinite, without a copy of the tensor."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def read_blocks(child: Checkpoint) -> tuple[ModelConfig, list[tuple[Attention, Ffn]]]:
    """Read geometry and blocks of a child's checkpoint, from its config.json."""
    return from_nemotron_nas(child.config_json(), str(child.folder / "config.json"))


@dataclass
class CheckpointWriter:
    """Writes tensors in shards of bounded size; the index and the checksums come last.

    Use: `add` tensors in order, write the other files of the folder, then `finish`. Peak memory is one shard.
    """

    folder: Path
    max_shard_bytes: int
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _shards: list[tuple[Path, list[str]]] = field(default_factory=list)
    _total_bytes: int = 0
    checksums: dict[str, str] = field(default_factory=dict)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors; a shard that is full is written."""
        for name, tensor in tensors.items():
            assert name not in self.checksums, name
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self.max_shard_bytes:
                self._flush()
            # a copy, since safetensors refuses tensors that share memory (tied ones, slices)
            self._pending[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            self._pending_bytes += size
            self.checksums[name] = tensor_sha256(self._pending[name])

    def _flush(self) -> None:
        path = self.folder / f"model-{len(self._shards) + 1:05d}.safetensors"
        with write_whole(path) as temporary:
            save_file(self._pending, temporary, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Give the shards their final names, write the index (one shard needs none) and the checksums of all files."""
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
        others = sorted(file for file in self.folder.rglob("*") if file.is_file() and file.suffix != ".safetensors")
        files = {str(file.relative_to(self.folder)): sha256(file) for file in others if file.name != CHECKSUMS}
        write_sealed(self.folder / CHECKSUMS, asdict(Checksums(self.checksums, files)))
