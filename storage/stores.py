"""Where the finished files of a folder are kept: in the folder itself, or in a bucket.

A stage writes the files of a piece into its folder and reads them from there, wherever they are kept. With
`storage.root: s3://...` the folders of the activation cache and of the library are no DVC outs but hold what this
machine has of the bucket; DVC has the records of the pieces, which name every object by its sha256 (storage/pieces.py).
`Paths` says which folders are kept so.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage.files import sha256, verify

RECORDS = ".pieces"


class Store(Protocol):
    """Keeps the finished files of `folder`; files are named as they lie in it, checksums are their sha256."""

    @property
    def home(self) -> Path:
        """Return the folder that DVC has: it holds the records."""

    def record_path(self, name: str) -> Path:
        """Return the file of a piece's record."""

    def names(self) -> list[str]:
        """Return the names of all pieces with a record, sorted."""

    def holds(self, files: Mapping[Path, str]) -> bool:
        """Tell whether every file is kept, as far as that shows without reading what is far away."""

    def publish(self, name: str) -> None:
        """Keep the files of a piece whose record lies in the folder's `.pieces`; its record at home comes last."""

    def publish_finished(self, keys: Mapping[str, str]) -> None:
        """Publish what an earlier run finished and did not publish, where name and content key are among `keys`."""

    def check_writable(self) -> None:
        """Raise InputError if nothing could be published."""

    def bring(self, path: Path, checksum: str, rebuild: str) -> None:
        """Have a file in the folder, as it was written.

        Raises:
            DamagedFileError: it is missing or differs; the message names the command `rebuild` that makes it anew.
        """

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to bring the files of pieces that will be read soon, in their order; returns at once."""


@dataclass(frozen=True)
class LocalStore:
    """Keeps files where they are."""

    folder: Path

    @property
    def home(self) -> Path:
        """Return the folder itself."""
        return self.folder

    def record_path(self, name: str) -> Path:
        """Return the file of a piece's record."""
        return self.folder / RECORDS / f"{name}.json"

    def names(self) -> list[str]:
        """Return the names of all pieces with a record, sorted."""
        return sorted(path.stem for path in (self.folder / RECORDS).glob("*.json"))

    def holds(self, files: Mapping[Path, str]) -> bool:
        """Tell whether every byte is as written."""
        return all(path.is_file() and sha256(path) == checksum for path, checksum in files.items())

    def publish(self, name: str) -> None:
        """Do nothing: the files and the record are where they belong."""

    def publish_finished(self, keys: Mapping[str, str]) -> None:
        """Do nothing: what is finished is published."""

    def check_writable(self) -> None:
        """Do nothing: a disk that refuses says so by itself."""

    def bring(self, path: Path, checksum: str, rebuild: str) -> None:
        """Compare a file with its checksum."""
        verify(path, checksum, rebuild)

    def prefetch(self, names: Iterable[str]) -> None:
        """Do nothing: they are here."""


_STORES = dict[Path, Store]()
"""The folders of this process whose files are kept elsewhere."""


def keep_in(folder: Path, store: Store) -> None:
    """Have the finished files of a folder kept in a store, from now on in this process."""
    _STORES[folder] = store


def store_of(path: Path) -> Store:
    """Return the store of a folder, or of a file in one."""
    candidates: Iterable[Path] = (path, *path.parents) if _STORES else ()
    return next((_STORES[folder] for folder in candidates if folder in _STORES), LocalStore(path))
