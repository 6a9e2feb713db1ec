"""Finished files in a bucket: published under their sha256, brought back into a cache of bounded size.

`artifacts/<name>` then holds the records of the pieces alone, `<split or block>/<piece>.json`: each names its files and
their sha256, so it is the manifest that DVC versions. `artifacts/cached/<name>` holds what this machine has of the
files. A piece is finished there under the same record first, in `.pieces`: whatever stops its way into the bucket, the
next run sends the files on and computes nothing again.

Objects that no record names any more stay, since records of other commits and clones may name them (docs/scale.md).
"""

import contextlib
import functools
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from storage.bucket import Bucket
from storage.file_cache import PART, FileCache, is_writable
from storage.files import DamagedFileError, InputError, read_sealed, sha256, to_run, write_sealed, write_whole
from storage.stores import RECORDS, keep_in

_TRANSFERS = 8
"""Files that a process uploads, or fetches ahead, at the same time."""
_READ_BYTES = 8 << 20
_SHARDS_AHEAD = 8
_BOUNDARIES_AHEAD = 2
_CLONE = ".clone"
"""File of a cache with the artifacts' folder that it belongs to."""
_GIB = 2**30


class BucketStore:
    """Keeps the finished files of `folder`, which lies in a cache, in a bucket, and the records at `home`.

    With `reads_on` the pieces are shards, a file for each boundary, and what is read next is fetched ahead: the shard's
    next boundaries; at the first boundary that this process reads of a split, the next shards, too. Which of them it
    reads there it reads at all boundaries.
    """

    def __init__(self, folder: Path, home: Path, bucket: Bucket, cache: FileCache, reads_on: bool) -> None:
        self.folder, self._home = folder, home
        self._bucket, self._cache, self._reads_on = bucket, cache, reads_on
        self._asked: set[tuple[Path, str]] = set()
        self._checksums: dict[Path, str] = {}
        self._next_shards: dict[Path, list[Path]] = {}
        self._next_boundaries: dict[Path, list[Path]] = {}
        self._first_boundaries: dict[Path, Path] = {}

    @property
    def home(self) -> Path:
        """Return the folder that DVC has."""
        return self._home

    def record_path(self, name: str) -> Path:
        """Return the file of a piece's record: by split or block, so that DVC tells changes of one from another's."""
        return self._home / name.partition(".")[0] / f"{name}.json"

    def names(self) -> list[str]:
        """Return the names of all pieces with a record, sorted."""
        paths = (path for path in self._home.glob("*/*.json") if path.parent.name == path.stem.partition(".")[0])
        return sorted(path.stem for path in paths)

    def holds(self, files: Mapping[Path, str]) -> bool:
        """Tell whether the bucket has an object for every file; their bytes are compared when they are read."""
        return None not in _at_once(self._bucket.size, files.values())

    def publish(self, name: str) -> None:
        """Send the files of a finished piece to the bucket, then write its record at home.

        Raises:
            InputError: the store refuses, or cannot be reached; the next run goes on here.
        """
        self._publish(name, self.folder)

    def publish_finished(self, keys: Mapping[str, str]) -> None:
        """Publish what was finished and not published, before the folder was kept in a bucket too; drop the rest."""
        for base in (self.folder, self._home):
            for path in sorted((base / RECORDS).glob("*.json")):
                if self._is_whole(path, base, keys.get(path.stem)):
                    self._publish(path.stem, base)
        for path in self.folder.rglob("*"):
            if path.is_file() and path.suffix != PART and is_writable(path.stat()):
                path.unlink()

    def _is_whole(self, path: Path, base: Path, key: str | None) -> bool:
        """Tell whether a record that was not published has this key, and all its files are as written."""
        with contextlib.suppress(DamagedFileError, FileNotFoundError):
            record = read_sealed(path, "the stage again")
            return record["key"] == key and all(sha256(base / file) == sum_ for file, sum_ in record["files"].items())
        return False

    def _publish(self, name: str, base: Path) -> None:
        pending = base / RECORDS / f"{name}.json"
        record = read_sealed(pending, "the stage again")
        files: dict[str, str] = record["files"]
        _at_once(lambda item: self._bucket.put(base / item[0], item[1]), files.items())
        write_sealed(self.record_path(name), record)
        pending.unlink()
        for file, checksum in files.items():
            if base != self.folder:
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(base / file, self.folder / file)
            self._cache.add(self.folder / file, checksum)
        self._cache.shrink()

    def check_writable(self) -> None:
        """Raise InputError if the bucket is not there, or may not be written."""
        self._bucket.check_writable()

    def bring(self, path: Path, checksum: str, rebuild: str) -> None:
        """Have a copy of a file in the cache.

        Raises:
            DamagedFileError: the object is missing, or its bytes are others; then it is deleted from the bucket.
            InputError: the store refuses, or cannot be reached.
        """
        if self._reads_on:
            self._fetch_following(path, checksum)
        self._fetch(path, checksum, rebuild, is_needed=True)
        self._cache.was_read(path)

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to bring the files of pieces that will be read soon, in their order; what finds no room is left out."""
        for name in names:
            self._fetch_ahead(self._files_of(name))

    def _files_of(self, name: str) -> dict[Path, str]:
        """Return the checksums of a piece's files; none where it has no record that can be read: its reader says so."""
        with contextlib.suppress(InputError):
            record = read_sealed(self.record_path(name), "the stage again")
            return {self.folder / file: checksum for file, checksum in record["files"].items()}
        return {}

    def _fetch_ahead(self, files: Mapping[Path, str]) -> None:
        for path, checksum in files.items():
            if (path, checksum) not in self._asked:
                self._asked.add((path, checksum))
                _ahead(os.getpid()).put(functools.partial(self._fetch, path, checksum, "", is_needed=False))

    def _fetch_following(self, path: Path, checksum: str) -> None:
        """Begin to bring what is read behind a file."""
        if self._checksums.get(path) != checksum:
            self._read_records()
        following = [*self._next_boundaries.get(path, ())]
        if self._first_boundaries.setdefault(path.parent.parent, path.parent) == path.parent:
            following = [*self._next_shards.get(path, ()), *following]
        checksums = self._checksums
        self._fetch_ahead({next_path: checksums[next_path] for next_path in following if next_path in checksums})

    def _read_records(self) -> None:
        """Note the files of all pieces, and which are read behind each."""
        pieces = [self._files_of(name) for name in self.names()]
        checksums = {path: checksum for piece in pieces for path, checksum in piece.items()}
        folders: dict[Path, list[Path]] = {}
        for path in sorted(checksums):
            folders.setdefault(path.parent, []).append(path)
        next_shards, next_boundaries = dict[Path, list[Path]](), dict[Path, list[Path]]()
        for paths in folders.values():
            for number, path in enumerate(paths, 1):
                next_shards[path] = paths[number : number + _SHARDS_AHEAD]
        for piece in pieces:
            for number, path in enumerate(piece, 1):
                next_boundaries[path] = [*piece][number : number + _BOUNDARIES_AHEAD]
        self._checksums, self._next_shards, self._next_boundaries = checksums, next_shards, next_boundaries

    def _fetch(self, path: Path, checksum: str, rebuild: str, is_needed: bool) -> None:
        """Fetch a file into the cache unless it is there; where nobody waits for it, only if there is room."""
        if self._cache.has(path, checksum):
            return
        with self._cache.filling(path) as part:
            if self._cache.has(path, checksum):  # others were at it
                return
            first = self._bucket.read(checksum, 0, _READ_BYTES)
            if first is None:
                raise self._damaged(checksum, path, "is missing from the bucket although its record lists it", rebuild)
            if not self._cache.reserve(part, first[1], is_needed):
                return
            if (digest := self._download(part, checksum, *first)) != checksum:
                digest = self._download(part, checksum, b"", first[1])  # it may have been the way
            if digest != checksum:
                if is_needed:  # else whoever reads the file finds it, and says so
                    self._refuse(checksum, digest, path, rebuild)
                return
            self._cache.put_in_place(part, path, checksum, is_needed)

    def _download(self, part: BinaryIO, checksum: str, first: bytes, size: int) -> str:
        """Write an object into a file, range by range behind its first bytes; return the sha256 of all."""
        digest = hashlib.sha256(first)
        part.seek(0)
        part.write(first)
        while part.tell() < size and (following := self._bucket.read(checksum, part.tell(), part.tell() + _READ_BYTES)):
            digest.update(following[0])
            part.write(following[0])
        return digest.hexdigest()

    def _refuse(self, checksum: str, digest: str, path: Path, rebuild: str) -> None:
        """Delete an object that is not as its name says, which would be left alone when it is made anew; raise."""
        problem = f"is damaged: sha256 {digest[:12]}…, expected {checksum[:12]}…"
        try:
            self._bucket.remove(checksum)
        except InputError as error:
            raise self._damaged(checksum, path, f"{problem}, and cannot be deleted ({error})", rebuild) from None
        raise self._damaged(checksum, path, f"{problem}, and was deleted from the bucket", rebuild)

    def _damaged(self, checksum: str, path: Path, problem: str, rebuild: str) -> DamagedFileError:
        """Return the error for an object; DVC sees no change of the records, so it is told to run the stage."""
        command = rebuild.replace("dvc repro ", "dvc repro --force --single-item ", 1)
        file = path.relative_to(self.folder)
        return DamagedFileError(f"{self._bucket.address(checksum)} ({file}) {problem}; {to_run(command)}")


def keep_in_bucket(name: str, artifacts: Path, root: str, cache_gib: float, reads_on: bool) -> Path:
    """Have the finished files of artifacts/<name> kept in a bucket.

    Args:
        name: the folder's name, and the objects'.
        artifacts: the folder of all artifacts.
        root: s3://bucket/folder.
        cache_gib: the most that this machine keeps of all such folders together, in GiB.
        reads_on: whether files are fetched ahead, see :class:`BucketStore`.

    Returns the folder in the cache that files are written to and read from.
    """
    store = _store(name, artifacts, root, cache_gib, reads_on)
    keep_in(store.folder, store)
    return store.folder


@functools.cache
def _store(name: str, artifacts: Path, root: str, cache_gib: float, reads_on: bool) -> BucketStore:
    cache = _cache(artifacts / "cached", round(cache_gib * _GIB))
    _claim(cache.folder, artifacts)
    return BucketStore(cache.folder / name, artifacts / name, Bucket(f"{root}/{name}"), cache, reads_on)


def _claim(folder: Path, artifacts: Path) -> None:
    """Have a cache be one clone's: what is there and was not sent is the clone's own, to send or to delete.

    Raises:
        InputError: it is another clone's, through a symlink.
    """
    mark, home = folder / _CLONE, str(artifacts.resolve())
    owner = mark.read_text(encoding="utf-8") if mark.is_file() else ""
    if owner == home:
        return
    if owner and (Path(owner) / folder.name).resolve() == folder.resolve():  # else the clone was moved or copied
        raise InputError(f"{folder} is the cache of {owner} already; give it a folder of its own")
    with write_whole(mark) as temporary:
        temporary.write_text(home, encoding="utf-8")


@functools.cache
def _cache(folder: Path, limit_bytes: int) -> FileCache:
    return FileCache(folder, limit_bytes)


def _at_once(work: Callable[[Any], Any], items: Any) -> list[Any]:
    """Do something with every item, several at the same time; return the results in order."""
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        return list(pool.map(work, items))


@functools.cache
def _ahead(_process: int) -> "SimpleQueue[Callable[[], None]]":
    """Return the queue of what this process fetches ahead; its threads end with the process, whatever they do."""
    queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
    for _ in range(_TRANSFERS):
        threading.Thread(target=_work_off, args=(queue,), daemon=True, name="fetch ahead").start()
    return queue


def _work_off(queue: "SimpleQueue[Callable[[], None]]") -> None:
    while True:
        fetch = queue.get()
        with contextlib.suppress(InputError, OSError):  # whoever needs the file meets the same error
            fetch()
