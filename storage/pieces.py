"""Finished pieces of a stage: how every long stage resumes after kill -9.

A stage splits into pieces (a shard, the variants of a block, the rows of a block on a batch). A piece has a *content
key*: a digest of its inputs, of the params that it depends on, and of the code that computes it
(storage/code_digest.py). When the files of a piece are written, its record `<folder>/.pieces/<name>.json` follows,
last. When a stage starts it keeps the pieces whose key and checksums match and deletes all others, so nothing stale
survives a change of params, parent or code.

Where the folder's files are kept in a bucket (storage/stores.py), they go there before the record, which then lies at
home, in the folder that DVC has; whether they are whole shows when they are read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.files import DamagedFileError, InputError, read_sealed, sha256, to_run, write_sealed
from storage.json_records import as_record
from storage.stores import RECORDS, Store, store_of


@dataclass(frozen=True)
class _Record:
    """The record of a piece: its content key, checksums of its files by their paths, small JSON values."""

    key: str
    files: dict[str, str]
    facts: dict[str, Any]


class _Facts(dict[str, Any]):
    """The facts of a record; to ask for one that an older version of the stage did not write raises InputError."""

    def __init__(self, facts: Mapping[str, Any], path: Path, rebuild: str) -> None:
        super().__init__(facts)
        self._path, self._rebuild = path, rebuild

    def __missing__(self, name: str) -> Any:
        raise InputError(f"{self._path} has no {name}: another version of the stage wrote it; {to_run(self._rebuild)}")


@dataclass(frozen=True)
class Pieces:
    """The finished pieces in `folder`.

    Attributes:
        folder: holds the files of the pieces; their records are in its `.pieces`, or at home.
        rebuild: the command that makes them anew, for messages.
    """

    folder: Path
    rebuild: str

    @property
    def home(self) -> Path:
        """Return the folder that DVC has: this one, or where the records are if the files are kept in a bucket."""
        return self._store.home

    @property
    def _store(self) -> Store:
        return store_of(self.folder)

    def _path(self, name: str) -> Path:
        return self._store.record_path(name)

    def _files(self, record: Mapping[str, Any]) -> dict[Path, str]:
        return {self.folder / file: checksum for file, checksum in record["files"].items()}

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of a finished piece, {key, files: {path: sha256}, facts}; None if there is none.

        Raises:
            DamagedFileError: the record itself was altered, or is none.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        record = read_sealed(path, self.rebuild)
        as_record(record, _Record, str(path), self.rebuild)
        return {**record, "facts": _Facts(record["facts"], path, self.rebuild)}

    def done(self, name: str, key: str) -> bool:
        """Tell whether the piece was finished under this key and its files are kept, local ones byte by byte."""
        try:
            record = self.record(name)
        except DamagedFileError:
            return False
        return record is not None and record["key"] == key and self._store.holds(self._files(record))

    def finish(
        self, name: str, key: str, files: Iterable[Path] | Mapping[Path, str], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Record a piece whose files are written.

        Args:
            name: the piece's name.
            key: its content key.
            files: its files, inside the folder, or a mapping from them to their checksums.
            facts: small JSON values that are kept with it.
        """
        checksums = files if isinstance(files, Mapping) else {file: sha256(file) for file in files}
        by_path = {str(file.relative_to(self.folder)): checksum for file, checksum in checksums.items()}
        record = {"key": key, "files": by_path, "facts": dict(facts or {})}
        write_sealed(self.folder / RECORDS / f"{name}.json", record)
        self._store.publish(name)

    def get(self, name: str) -> dict[str, Any]:
        """Return the record of a piece that has to be finished.

        Raises:
            InputError: it is not; the message names the command that makes it.
        """
        record = self.record(name)
        if record is None:
            names = self.names()
            finished = f"{len(names)}: {', '.join(names[:3])}…"
            raise InputError(f"{self.folder} has no piece {name!r} (has {finished}); {to_run(self.rebuild)}")
        return record

    def names(self) -> list[str]:
        """Return names of all finished pieces, sorted."""
        return self._store.names()

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to bring the files of pieces that will be read soon, in their order, where they are far away."""
        self._store.prefetch(names)

    def keep_only(self, keys: Mapping[str, str]) -> list[str]:
        """Delete every file that belongs to no finished piece of `keys`.

        Args:
            keys: name -> content key of every piece that the stage asks for.

        Returns:
            Names of the pieces that are still to make, in the order of `keys`.
        """
        self._store.publish_finished(keys)
        done = {name for name, key in keys.items() if self.done(name, key)}
        current_files = {self._path(name) for name in done}
        current_files |= {self.folder / file for name in done for file in self.get(name)["files"]}
        if self.home.is_dir():
            for path in sorted(self.home.rglob("*"), reverse=True):
                if path.is_file() and path not in current_files:
                    path.unlink()
                elif path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
        missing = [name for name in keys if name not in done]
        if missing:
            self._store.check_writable()
        return missing


def verify(path: Path, expected_sha256: str, rebuild: str) -> None:
    """Have a file of a piece at its path, and compare it with the checksum recorded when it was written.

    Raises:
        DamagedFileError: it is missing or differs; the message names the command `rebuild` that makes it anew.
    """
    store_of(path).bring(path, expected_sha256, rebuild)
