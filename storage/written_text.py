"""Text that the parent wrote, on disk: a .jsonl file for each batch of texts and of chats, each a finished piece."""

from pathlib import Path
from typing import Literal

from storage.files import InputError, verify
from storage.pieces import Pieces

WrittenKind = Literal["texts", "chats"]
REBUILD = "dvc repro write_text"


def batch_name(kind: WrittenKind, number: int) -> str:
    """Return the name of a batch's piece, and of its file without `.jsonl`: rows of `text`, or of `messages`."""
    return f"{kind}_{number:05d}"


def written_files(folder: Path, kind: WrittenKind) -> dict[str, str]:
    """Return the checksum of every file of a kind, by its path, in order; each file is compared with it.

    Raises:
        InputError: there is none.
        DamagedFileError: a file's bytes are not those that were written.
    """
    pieces = Pieces(folder, REBUILD)
    files: dict[str, str] = {}
    for name in pieces.names():
        if name.startswith(kind):
            files |= {str(folder / file): checksum for file, checksum in pieces.get(name)["files"].items()}
    if not files:
        raise InputError(f"{folder} has no {kind} of the parent's; run `{REBUILD}`")
    for file, checksum in files.items():
        verify(Path(file), checksum, REBUILD)
    return files
