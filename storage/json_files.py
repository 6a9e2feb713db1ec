"""JSON files that others write, such as config.json: one object, or refused in one sentence before much is built of it.

Files of this project are read by storage/json_records.py.
"""

import json
import math
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from storage.files import InputError, damaged, to_run

MAX_BYTES = 16 << 20
"""Ten thousand blocks of a nemotron-nas config.json take 4 MiB."""
_MAX_DIGITS = 40


def read_object(path: Path, rebuild: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object of a JSON file, with finite numbers and every key once.

    Args:
        path: the file, UTF-8 without a byte order mark.
        rebuild: the command or step that makes the file.
        max_bytes: a larger file is refused.

    Raises:
        InputError: the file is missing, cannot be read, or is too large.
        DamagedFileError: it does not hold such an object.
    """
    text = read_text(path, rebuild, max_bytes)
    try:
        value = parse(text)
    except ValueError as error:
        raise damaged(path, f"is not valid JSON ({error})", rebuild) from None
    if not isinstance(value, dict):
        raise damaged(path, f"is {_KINDS[type(value)]}, expected a JSON object", rebuild)
    return value


def parse(text: str) -> Any:
    """Return the value of a JSON text, with finite numbers and every key once.

    Raises:
        ValueError: it is no such text; the message says why.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_with_every_key_once,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("its values lie too deep in each other") from None


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def read_text(path: Path, rebuild: str, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a regular file of at most `max_bytes`, in UTF-8 without a byte order mark.

    Raises:
        InputError: it is missing, of another kind, too large, or has a byte order mark.
        DamagedFileError: it is not UTF-8.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "device"
            raise InputError(f"{path} is a {kind}, expected a file; check the path")
        with path.open("rb") as handle:
            data = handle.read(max_bytes + 1)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {to_run(rebuild)}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if len(data) > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes >> 20} MiB, which no such file is; check the path")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise damaged(path, f"is not UTF-8 ({problem})", rebuild) from None
    if text.startswith("\ufeff"):
        raise InputError(f"{path} begins with a byte order mark, which readers of JSON refuse; save it without")
    return text


def _with_every_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:_MAX_DIGITS]!r} stands in an object twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_MAX_DIGITS]} is too large a number")
    return value
