"""Files that travel beside the weights, from source to parent to child to exports: tokenizer, licence, model card.

A file counts if it lies in its folder, or if it is a link to an object of a cache: of the hub's cache for this very
model, or of DVC's. A link to anything else is refused by name, so that no file of the machine travels on unseen.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from storage.files import InputError
from storage.yaml_files import parse_foreign_yaml

_log = logging.getLogger(__name__)

CARD = "README.md"
LICENCE_FILES = ("LICEN[CS]E*", "USE_POLICY*", "NOTICE*")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
"""Patterns of the files that a tokenizer and its chat templates are made of."""
GENERATION_FILES = (*TOKENIZER_FILES, "generation_config.json")
"""Patterns of the files that travel unchanged from source to parent to child to exports."""
_HUB_OBJECT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_DVC_OBJECT = re.compile("/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
_MAX_CARD_BYTES = 1 << 20
_MAX_LICENCE = 200


def check_inside(path: Path, folder: Path) -> None:
    """Raise InputError unless a file of a folder lies there, or is a link to an object of the hub's or DVC's cache."""
    try:
        target, inside = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):
        raise InputError(f"{path} is a link that leads nowhere; copy the file there, or remove the link") from None
    model = inside.parents[1] if len(inside.parts) > 2 and inside.parent.name == "snapshots" else None
    is_of_hub = model and target.parent == model / "blobs" and _HUB_OBJECT.fullmatch(target.name)
    if not (target.is_relative_to(inside) or is_of_hub or _DVC_OBJECT.search(str(target))):
        raise InputError(f"{path} leads out of {folder}; copy the file there if it belongs to it, or remove the link")
    if not target.is_file():
        raise InputError(f"{path} is no regular file; remove it")


def side_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return files of a folder that match one of the patterns, sorted.

    Raises:
        InputError: one of them is a link that leads out of the folder, no regular file, or has a name that is not
            UTF-8.
    """
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    files = [path for path in paths if path.is_symlink() or not path.is_dir()]
    for file in files:
        try:
            str(file.relative_to(folder)).encode()
        except UnicodeEncodeError:
            raise InputError(f"{file.name!r} in {folder} is no name in UTF-8; rename the file, or remove it") from None
        check_inside(file, folder)
    return files


def copy_side_files(files: Iterable[Path], folder: Path, into: Path) -> None:
    """Copy files of a folder to the same places in another."""
    for file in files:
        copy = into / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def card_text(folder: Path) -> str | None:
    """Return the model card; None: there is none, or one that cannot be read, which is logged."""
    card = folder / CARD
    if not card.is_file():
        return None
    try:
        check_inside(card, folder)
        with card.open("rb") as handle:
            data = handle.read(_MAX_CARD_BYTES + 1)
        if len(data) > _MAX_CARD_BYTES:
            raise InputError(f"{card} is larger than {_MAX_CARD_BYTES >> 20} MiB, which no card is")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        _log.warning("%s is not UTF-8 (byte %d is 0x%02x); it is left out", card, error.start, byte)
    except (InputError, OSError) as error:
        _log.warning("%s; it is left out", error)
    return None


def licence_of(folder: Path) -> str:
    """Return the licence's name from the front matter of the model card, else `see licence files`, else `unknown`."""
    fields = _front_matter(card_text(folder) or "", folder / CARD)
    licence, name, link = (_words(fields.get(key)) for key in ("license", "license_name", "license_link"))
    if name and licence in ("", "other"):
        licence = f"{name} ({link})" if link else name
    if licence:
        return licence
    return "see licence files" if side_files(folder, LICENCE_FILES[:1]) else "unknown"


def _front_matter(card: str, path: Path) -> dict[str, object]:
    """Return the mapping between the two lines `---` that a card begins with; empty: it has none that can be read."""
    lines = card.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    ends = [number for number, line in enumerate(lines) if number and line.rstrip() == "---"]
    try:
        fields = parse_foreign_yaml("\n".join(lines[1 : ends[0]]), path) if ends else None
    except InputError as error:
        _log.warning("%s; no licence is read from its front matter", error)
        return {}
    return fields if isinstance(fields, dict) else {}


def _words(value: object) -> str:
    """Return a text, or the texts of a list, in one line; empty: anything else."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    line = ", ".join(" ".join(text.split()) for text in texts)
    return "".join(filter(str.isprintable, line))[:_MAX_LICENCE]
