"""Files that are whole or absent: write by rename, checksums, JSON and its seal, and the errors that users see.

Every writer in the project goes through :func:`write_whole`, so a file that exists is complete. Every reader of an
artifact compares what it reads with what was written: with the checksum that a manifest recorded (:func:`verify`), or
with the seal that the file itself carries (:func:`read_sealed`; tables: storage/parquet_files.py).
"""

import contextlib
import difflib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

SEAL = "seal"
"""The last key of a record that this project writes: the digest of all others."""
_DVC_CACHE = Path(".dvc/cache/files/md5")
"""Where DVC keeps what stages made, in the clone's root."""
_LOCK = "lock"
"""The file in an unfinished folder that its run holds locked."""
_CHUNK_BYTES = 1 << 20
_TICK_NS = 2_000_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_IS_FULL = re.compile(r"No space left|Not enough free space to write|^\d+ requested and \d+ written$")
"""What libraries write when a disk is full and they keep no errno; the last two are numpy's."""
_IS_TOO_LARGE = re.compile(r"File too large")
"""The same where a file is larger than its disk or a limit of the process takes."""
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IS_REFUSED = re.compile(r"Permission denied|Operation not permitted|Read-only file system")
"""The same where a file may not be written."""


_DIGESTS = dict["FileState", str]()
"""The sha256 of the files that this process has read whole."""


class InputError(ValueError):
    """An input cannot be used. The message says what was expected, what was found, where, and what to do."""

    exit_code = 2


class DamagedFileError(InputError):
    """An artifact's bytes are not the ones that were written."""

    exit_code = 4


class DiskFullError(InputError):
    """There is no room for what a stage writes."""

    exit_code = 5


def to_run(rebuild: str) -> str:
    """Return what a message tells people to run: a command in marks; words, such as `the download again`, without."""
    return f"run {rebuild}" if rebuild.startswith("the ") else f"run `{rebuild}`"


def damaged(path: Path, problem: str, rebuild: str) -> DamagedFileError:
    """Return the error for a file that is not as its stage wrote it; `rebuild` names the command that makes it anew.

    The file gets a new date: DVC goes by date and size, and would call a stage up to date whose bytes rotted.
    """
    if rebuild.startswith("dvc "):
        with contextlib.suppress(OSError):
            os.utime(path)
        if not path.is_absolute():
            _have_cache_checked(path)
    return DamagedFileError(f"{path} {problem}; {to_run(rebuild)}")


def _have_cache_checked(artifact: Path) -> None:
    """Have DVC read objects of its cache again before it uses them: those that a damaged artifact may have come from.

    A file has the size of its object; folders have lists.
    """
    with contextlib.suppress(OSError):
        size = artifact.stat().st_size if artifact.exists() else None
        for cached in _DVC_CACHE.glob("??/*"):
            if cached.suffix == ".dir" or cached.stat().st_size == size:
                _distrust(cached)


def have_cached_copy_checked(artifact: Path) -> None:
    """Have DVC read what its cache has of a new artifact, before it takes that for the artifact after the stage.

    Of a file that is the object with its digest, which DVC would put in the file's place; of a folder the list of its
    files, which DVC would keep as it is. Lists are small, so all of them are read.
    """
    with contextlib.suppress(OSError):
        if artifact.is_dir():
            cached = [*_DVC_CACHE.glob("??/*.dir")]
        else:
            with artifact.open("rb") as handle:
                digest = hashlib.file_digest(handle, "md5").hexdigest()
            cached = [_DVC_CACHE / digest[:2] / digest[2:]]
        for path in cached:
            _distrust(path)


def _distrust(cached: Path) -> None:
    """Take from an object of DVC's cache that it is read-only, and what DVC remembers of it.

    DVC trusts what is read-only, rotten or not; what may be written it compares with its name, and drops where they
    differ.
    """
    cached.chmod(0o644)
    os.utime(cached)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message: `, did you mean seed?` with the nearest of `names`; empty if none is near."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {nearest[0]}?" if nearest else ""


def explained(error: Exception, path: Path | None = None) -> InputError | None:
    """Return the error for people where a file could not be written, and None where `error` is another.

    Args:
        error: the exception of a library; some wrap the system's error in types of their own.
        path: the file; None: the one that the error names.
    """
    number, text = getattr(error, "errno", None), str(error)
    place = path or getattr(error, "filename2", None) or getattr(error, "filename", None) or "a file"
    if number in _FULL or _DISK_IS_FULL.search(text):
        return DiskFullError(
            f"the disk is full: {place} could not be written; free some space and run the same command again "
            "(finished pieces are kept)"
        )
    if _IS_TOO_LARGE.search(text):
        return DiskFullError(
            f"{place} could not be written: it is larger than its disk or the limit on a file's size (ulimit -f) "
            "takes; raise the limit or take another disk, and run the same command again (finished pieces are kept)"
        )
    if number in _REFUSED or _IS_REFUSED.search(text):
        return InputError(
            f"{place} cannot be read or written: the system refuses it (permission denied, or a read-only disk); give "
            "this user the right to the file and its folder, and run the same command again"
        )
    return None


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place.

    A block that raises leaves `path` as it was and no temporary file behind. The suffix is kept, since some
    writers look at it.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)  # some writers make files that only their owner reads
        temporary.replace(path)
    except InputError:
        raise
    except Exception as error:  # raised again below: libraries wrap the system's errors in types of their own
        if readable := explained(error, path):
            raise readable from error
        raise
    finally:
        with contextlib.suppress(OSError):  # of a folder that nobody may write to; the first error counts
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def unfinished_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`, to fill and to name by :func:`replace_folder`; what is left of it goes.

    Folders of runs that were killed go first: a run that lives holds a lock on its own.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for lock in final.parent.glob(f".{final.name}-*/{_LOCK}"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), lock.open("r+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    prefix = f".{final.name}-"
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=prefix, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / f"{_LOCK}.new").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            (folder / f"{_LOCK}.new").rename(folder / _LOCK)  # nobody sees it before it is locked
            yield folder


def replace_folder(whole: Path, final: Path) -> None:
    """Give a whole folder its final name; an earlier folder of that name stays until then, and goes with `whole`'s."""
    if final.exists():
        final.rename(whole.with_name(f"{whole.name}.earlier"))
    whole.rename(final)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a stable key order (insertion order) and a final newline."""
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, rebuild: str) -> Any:
    """Read JSON; `rebuild` names the command that makes the file.

    Raises:
        InputError: the file is missing.
        DamagedFileError: it is not JSON.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing; {to_run(rebuild)}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5,000 digits; nested too deep
        raise damaged(path, f"is not valid JSON ({error})", rebuild) from error


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a record as JSON with its seal as the last key."""
    content = json.loads(json.dumps(value))  # as it will be read: keys are texts, tuples are lists
    write_json(path, {**content, SEAL: digest_of(content)})


def read_sealed(path: Path, rebuild: str) -> dict[str, Any]:
    """Read a record that :func:`write_sealed` wrote, without its seal.

    Raises:
        InputError: the file is missing.
        DamagedFileError: its content is not what was sealed.
    """
    value = read_json(path, rebuild)
    seal = value.pop(SEAL, None) if isinstance(value, dict) else None
    if seal is None or seal != digest_of(value):
        raise damaged(path, f"is damaged ({'its seal does not fit' if seal else 'it has no seal'})", rebuild)
    record: dict[str, Any] = value
    return record


class FileState(NamedTuple):
    """The state that tells whether a file was written to or replaced since: where it is, its size and its times."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read the state of a file; errors as of `Path.stat`."""
        stat = path.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    @property
    def is_settled(self) -> bool:
        """Tell whether a later write would show in the time; clocks of file systems tick up to once in two seconds."""
        return time.time_ns() - self.modified_ns > _TICK_NS


def sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes; a process reads it once as long as nobody writes to the file."""
    state = FileState.of(path)
    if earlier_digest := _DIGESTS.get(state):
        return earlier_digest
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    if state.is_settled:
        _DIGESTS[state] = digest.hexdigest()
    return digest.hexdigest()


def remember(path: Path, digest: str) -> None:
    """Take a digest that was made while this process wrote a file for the file's, which nobody writes to again."""
    _DIGESTS[FileState.of(path)] = digest


def digest_of(value: Any) -> str:
    """Return the hex sha256 of a JSON value in canonical form (sorted keys)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(path: Path, expected_sha256: str, rebuild: str) -> None:
    """Compare a file with the checksum recorded when it was written.

    Raises:
        DamagedFileError: the file is missing or differs; the message names the command `rebuild` that makes it anew.
    """
    if not path.is_file():
        raise damaged(path, "is missing although its manifest lists it", rebuild)
    digest = sha256(path)
    if digest != expected_sha256:
        raise damaged(path, f"is damaged: sha256 {digest[:12]}…, expected {expected_sha256[:12]}…", rebuild)
