"""Files that are whole or absent: write by rename, checksums, JSON, and the errors that users see.

Every writer in the project goes through :func:`write_whole`, so a file that exists is complete. Every reader
of an artifact compares the checksum that its manifest recorded, through :func:`verify`.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20
_FULL = re.compile(r"No space left|Not enough free space to write|^\d+ requested and \d+ written$")
"""How libraries say that a disk is full where they keep no errno; the last two are numpy's."""


class InputError(ValueError):
    """Something a user gave cannot be used. The message says: expected, found, where, what to do."""

    exit_code = 2


class DamagedFileError(InputError):
    """An artifact's bytes are not the ones that were written."""

    exit_code = 4


class DiskFullError(InputError):
    """There is no room for what a stage writes."""

    exit_code = 5


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place.

    A block that raises leaves `path` as it was and no temporary file behind. The suffix is kept, since some
    writers look at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)  # some writers make files that only their owner reads
        temporary.replace(path)
    except Exception as error:  # raised again below: libraries wrap ENOSPC in types of their own
        if getattr(error, "errno", None) == errno.ENOSPC or _FULL.search(str(error)):
            raise DiskFullError(
                f"the disk is full: {path} could not be written; free some space and run the same command again "
                "(finished pieces are kept)"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


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
        raise InputError(f"{path} is missing; run `{rebuild}`")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{path} is not valid JSON ({error}); run `{rebuild}`") from error


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form (sorted keys): the content key of params and manifests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(path: Path, expected_sha256: str, rebuild: str) -> None:
    """Compare a file with the checksum recorded when it was written.

    Raises:
        DamagedFileError: the file is missing or differs; the message names the command `rebuild` that makes it anew.
    """
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing although its manifest lists it; run `{rebuild}`")
    found = sha256(path)
    if found != expected_sha256:
        raise DamagedFileError(
            f"{path} is damaged: sha256 {found[:12]}…, expected {expected_sha256[:12]}…; run `{rebuild}`"
        )
