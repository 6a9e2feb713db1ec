"""Copies of what lies in a bucket, in a folder of bounded size: what was used longest ago goes first.

Several processes share a folder. A copy is written into `.<name>.part`, which its writer holds locked, compared with
its checksum, made read-only and named by rename: a name that exists is whole, two processes do not fetch the same
file twice at the same time, and what a killed one left is taken over. Room is made under the folder's lock, and
reserved by the size of the `.part`, so that the copies of all processes together stay within the limit.

Never deleted are files that are open or mapped now (the kernel says so, on Linux and local disks; elsewhere a deleted
file stays readable for whoever has it open), and files that may be written: they are not in the bucket yet.
"""

import contextlib
import errno
import fcntl
import logging
import os
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from storage.files import explained, remember, sha256

PART = ".part"
_LOCK = ".lock"
_JUST_USED_S = 2.0
"""A copy is compared, then opened: it stays for as long."""
_READ_ONLY = 0o444
_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_GIB = 2**30
_log = logging.getLogger(__name__)


@dataclass
class FileCache:
    """The copies in `folder`, at most `limit_bytes`."""

    folder: Path
    limit_bytes: int
    _used: dict[Path, float] = field(default_factory=dict)
    _unread: set[Path] = field(default_factory=set)
    _has_warned: bool = False

    def has(self, path: Path, checksum: str) -> bool:
        """Tell whether a whole copy is there; its bytes are read once a process."""
        try:
            if path not in self._used:
                with contextlib.suppress(PermissionError):  # another user's
                    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            is_right = sha256(path) == checksum
        except (FileNotFoundError, NotADirectoryError):
            self._used.pop(path, None)
            return False
        self._used[path] = time.time()
        return is_right

    def was_read(self, path: Path) -> None:
        """Note that a copy was read, so that it may go where others are fetched ahead."""
        self._unread.discard(path)

    @contextlib.contextmanager
    def filling(self, path: Path) -> Iterator[BinaryIO]:
        """Yield the `.part` of a copy, open and locked; it is deleted if the block ends without :meth:`put_in_place`.

        Raises:
            InputError: the folder cannot be written.
        """
        part = path.with_name(f".{path.name}{PART}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(part) as handle:
                try:
                    yield handle
                finally:
                    if _is_named(handle, part):
                        part.unlink()
        except OSError as error:
            if readable := explained(error, path):
                raise readable from error
            raise

    def reserve(self, part: BinaryIO, size: int, is_needed: bool) -> bool:
        """Make room for a copy and reserve it by the size of its `.part`.

        Args:
            part: of :meth:`filling`.
            size: bytes of the copy.
            is_needed: somebody waits for it, so that copies that were fetched ahead go, and the limit is exceeded where
                all others are in use.

        Returns whether the copy may be written.
        """
        part.truncate(0)
        with self._alone():
            fits = self._make_room(size, is_needed)
            if fits or is_needed:
                part.truncate(size)
        if is_needed and not fits and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "storage.cache_gib = %.3g is less than what is read at once; %s grows beyond it",
                self.limit_bytes / _GIB,
                self.folder,
            )
        return fits or is_needed

    def put_in_place(self, part: BinaryIO, path: Path, checksum: str, is_needed: bool) -> None:
        """Name a whole copy, whose checksum was taken as it was written."""
        part.flush()
        with self._alone():  # else who makes room may see neither name
            path.with_name(f".{path.name}{PART}").rename(path)
        if not is_needed:
            self._unread.add(path)
        self.add(path, checksum)

    def add(self, path: Path, checksum: str) -> None:
        """Take a whole file as a copy, which may be deleted from now on."""
        path.chmod(_READ_ONLY)
        self._used[path] = time.time()
        remember(path, checksum)

    def shrink(self) -> None:
        """Keep the limit after files were added."""
        with self._alone():
            self._make_room(0, is_needed=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, is_needed: bool) -> bool:
        """Delete copies until `size` more bytes fit; tell whether they do."""
        states = self._states()
        total = sum(state.st_size for state in states.values())
        for path, state in sorted(states.items(), key=lambda item: self._last_use(*item)):
            if total + size <= self.limit_bytes:
                break
            if (is_needed or path not in self._unread) and self._is_gone(path, state):
                total -= state.st_size
                self._used.pop(path, None)
                self._unread.discard(path)
        return total + size <= self.limit_bytes

    def _states(self) -> dict[Path, os.stat_result]:
        states = {}
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder) / name for name in names if name != _LOCK):
                with contextlib.suppress(FileNotFoundError):  # a writer who gave up
                    states[path] = path.stat()
        return states

    def _last_use(self, path: Path, state: os.stat_result) -> float:
        return max(state.st_atime, self._used.get(path, 0.0))

    def _is_gone(self, path: Path, state: os.stat_result) -> bool:
        """Delete a copy that nobody uses, or a `.part` that nobody writes; tell whether it is gone."""
        with contextlib.suppress(FileNotFoundError):
            if path.suffix == PART:
                return _is_abandoned(path)
            if is_writable(state) or time.time() - self._last_use(path, state) < _JUST_USED_S or _is_open(path):
                return False
            path.unlink()
        return True


def is_writable(state: os.stat_result) -> bool:
    """Tell whether a file is no copy but the only one: what is in the bucket is read-only here."""
    return bool(state.st_mode & _WRITABLE)


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Open a `.part` and lock it, also where others renamed or deleted it meanwhile."""
    while True:
        with part.open("ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_named(handle, part):
                with part.open("r+b") as written:
                    yield written
                return


def _is_named(handle: BinaryIO, path: Path) -> bool:
    """Tell whether an open file has this name still."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    return False


def _is_abandoned(part: Path) -> bool:
    """Delete a `.part` that nobody holds locked; tell whether it was."""
    with part.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if _is_named(handle, part):
            part.unlink()
    return True


def _is_open(path: Path) -> bool:
    """Tell whether any process has a file open or mapped: only then does the kernel refuse a lease on it."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    with path.open("rb") as handle:
        try:
            fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)  # who opens it meanwhile waits; SIGIO would end us
            fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:  # some file systems have no leases
            return error.errno == errno.EAGAIN
    return False
