"""The checkpoint of a training on ranks: whole or absent, verified when it is read, for any number of ranks.

torch.distributed.checkpoint writes it in its safetensors form, which holds no pickle (its own form does): a folder for
each kind of tensor (master, exp_avg, exp_avg_sq, best), in it a file for each rank with its rows and their offsets. The
folder gets its name when all files are whole, its record (storage/pieces.py) follows; the earlier one is deleted last.
Ranks share the file system. Where a checkpoint is read, each rank verifies some of the files.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from storage.files import DamagedFileError, explained, sha256, verify
from storage.gkd import GkdCurve
from storage.json_records import as_record
from storage.paths import Paths
from storage.pieces import Pieces

_STATE = "state"
_BEST = "best"


class ShardedCheckpoint:
    """The checkpoint of the training of a target's child that has a content key."""

    def __init__(self, target: str, key: str, paths: Paths) -> None:
        self._pieces = Pieces(paths.gkd_state(target), f"dvc repro distill_child@{target}")
        self._key = key
        self._saved: GkdCurve | None = None

    def curve(self) -> GkdCurve | None:
        """Return the curve at the last checkpoint of this very training, None if there is none."""
        record = self._record()
        if record is None:
            return None
        return as_record(record["facts"], GkdCurve, str(self._pieces.folder), self._pieces.rebuild)

    def _record(self) -> dict[str, Any] | None:
        try:
            record = self._pieces.record(_STATE)
        except DamagedFileError:
            return None
        return record if record is not None and record["key"] == self._key else None

    @property
    def _folder(self) -> Path:
        """Return the folder of the last checkpoint."""
        first, *_ = self._pieces.get(_STATE)["files"]
        return self._pieces.folder / Path(first).parts[0]

    def take(self) -> GkdCurve | None:
        """Verify the checkpoint and return its curve; where there is no whole one, what is there is deleted.

        Every rank calls it, and gets the same.
        """
        rank, ranks, record = dist.get_rank(), dist.get_world_size(), self._record()
        files = sorted(record["files"].items()) if record else []
        mine = (self._is_whole(file, checksum) for file, checksum in files[rank::ranks])
        is_whole = torch.tensor(int(record is not None and all(mine)))
        dist.all_reduce(is_whole, dist.ReduceOp.MIN)
        self._saved = self.curve() if is_whole else None
        dist.barrier()
        if rank == 0:
            self._delete_others(self._folder.name if is_whole else "")
        dist.barrier()
        return self._saved

    def _is_whole(self, file: str, checksum: str) -> bool:
        path = self._pieces.folder / file
        return path.is_file() and sha256(path) == checksum

    def _delete_others(self, current: str) -> None:
        """Delete everything but the folder `current` and its record."""
        if not self._pieces.folder.is_dir():
            return
        for path in self._pieces.folder.iterdir():
            if path.name != current and not (current and path.name == ".pieces"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def read(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Read a kind of tensor into `tensors`, shards on whatever device; every rank calls it."""
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(self._folder / kind)))

    def save(self, curve: GkdCurve, kinds: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Write a checkpoint, kind after kind; every rank calls it.

        Raises:
            DiskFullError: there is no room for it.
        """
        if curve == self._saved:
            return
        folder = self._pieces.folder / f"state_{len(curve.steps):06d}"
        unfinished = folder.with_name(f".{folder.name}")
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        dist.barrier()
        try:
            for kind, tensors in kinds:
                writer = HuggingFaceStorageWriter(str(unfinished / kind), save_distributed=True)
                save(dict(tensors), storage_writer=writer)
        except Exception as error:  # raised again below: torch wraps the system's errors of all ranks in one of its own
            if readable := explained(error, unfinished):
                raise readable from error
            raise
        checksums = _gathered(_checksums_of_rank(unfinished))
        if dist.get_rank() == 0:
            unfinished.rename(folder)
            files = {folder / name: checksum for name, checksum in checksums.items()}
            self._pieces.finish(_STATE, self._key, files, asdict(curve))
            self._delete_others(folder.name)
        dist.barrier()
        self._saved = curve

    def best_blocks(self, num_blocks: int) -> Iterator[dict[str, Tensor]]:
        """Yield the best weights of each block, named as within a Llama layer; no ranks are needed.

        Raises:
            DamagedFileError: a file is not as it was written.
        """
        best = sorted((self._folder / _BEST).glob("*.safetensors"))
        checksums = self._pieces.get(_STATE)["files"]
        for path in best:
            verify(path, checksums[str(path.relative_to(self._pieces.folder))], self._pieces.rebuild)
        with contextlib.ExitStack() as stack:
            rows: dict[str, list[Any]] = {}  # by name: the open files with rows of it, in the ranks' order
            for path in best:
                file = stack.enter_context(safe_open(path, framework="pt"))
                for name in list(file.keys()):
                    rows.setdefault(name, []).append(file)
            for index in range(num_blocks):
                prefix = f"layers.{index}."
                names = [name for name in rows if name.startswith(prefix)]
                yield {
                    name.removeprefix(prefix): torch.cat([file.get_tensor(name) for file in rows[name]])
                    for name in names
                }


def _checksums_of_rank(folder: Path) -> dict[str, str]:
    """Return the checksums of the files that this rank wrote."""
    files = folder.glob(f"*/shard-{dist.get_rank() + 1:05d}-*.safetensors")
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def _gathered(checksums: dict[str, str]) -> dict[str, str]:
    """Return the checksums of all ranks."""
    of_ranks: list[dict[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, checksums)
    return {name: checksum for part in of_ranks for name, checksum in (part or {}).items()}
