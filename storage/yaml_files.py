"""YAML files that people write: read as DVC reads them, or refused in one sentence with line and column.

The loader is DVC's (ruamel.yaml, YAML 1.2), so `010` is ten and `1:30` a text for both. What comes out is what JSON can
hold, with keys that are text. Size, depth and aliases are checked before anything is built of them.
"""

import contextlib
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from storage.files import InputError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000
"""Values of a file, those behind an alias counted wherever it stands; params.yaml has some hundreds."""

_MAX_DIGITS = 40
_NO_CHARACTER = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_VALUES = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
_MERGE = f"{_TAG}merge"
_Position = tuple[int, int]


def read_yaml(path: Path, missing: str = "check the path") -> Any:
    """Return the content of a YAML file: mappings with text as keys, lists, texts, numbers, booleans and null.

    Args:
        path: the file, at most MAX_BYTES.
        missing: the advice of the message where there is no such file.

    Raises:
        InputError: there is no such file, it cannot be read, or it is not YAML of that kind.
    """
    text = _text(path, missing)
    with _explained(path):
        _check_events(path, text, tags=False)
        _check_nodes(path, _yaml().compose(text))
        return _yaml().load(text)


def parse_foreign_yaml(text: str, path: Path) -> Any:
    """Return the content of YAML that strangers wrote for other readers: any values and tags, neither deep nor large.

    Raises:
        InputError: it is not YAML, or deeper or larger than that; `path` is named.
    """
    with _explained(path):
        _check_events(path, text, tags=True)
        return _yaml().load(text)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of ruamel.yaml into one sentence, with line and column where it knows them."""
    try:
        yield
    except InputError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = (mark.line, mark.column) if mark else None
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise _error(path, position, f"this is not valid YAML ({' '.join(problem.split())[:200]})") from None
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # ruamel: of tags on other values
        raise _error(path, None, f"this is not valid YAML ({' '.join(str(error).split())[:200]})") from None


def _yaml() -> YAML:
    """Return a loader as DVC makes it."""
    return YAML(typ="safe")


def _error(path: Path, position: _Position | None, problem: str) -> InputError:
    """Return the error at a position: line and column, both from 0."""
    where = f", line {position[0] + 1}, column {position[1] + 1}" if position else ""
    return InputError(f"{path}{where}: {problem}")


def _text(path: Path, missing: str) -> str:
    """Return the file's text; nothing larger than MAX_BYTES is read."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is a {'folder' if stat.S_ISDIR(mode) else 'device'}, expected a YAML file")
        with path.open("rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing; {missing}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB, far more than settings take; check the path")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise _error(path, _position(data[: error.start].decode("utf-8", "replace")), problem) from None
    text = text.removeprefix("\ufeff")
    if match := _NO_CHARACTER.search(text):
        problem = f"the character U+{ord(match[0]):04X} cannot stand in YAML; take it out"
        raise _error(path, _position(text[: match.start()]), problem)
    return text


def _position(before: str) -> _Position:
    """Return line and column that follow a text."""
    return before.count("\n"), len(before) - before.rfind("\n") - 1


def _check_events(path: Path, text: str, *, tags: bool) -> None:
    """Refuse what is too deep, too large with its aliases, or holds itself, maybe tags too; nothing is built yet."""
    sizes: dict[str, int] = {}
    around: list[tuple[str | None, int]] = []
    count = 0
    for event in _yaml().parse(text):
        kind = type(event).__name__
        position = (event.start_mark.line, event.start_mark.column) if event.start_mark else None
        if kind in ("SequenceEndEvent", "MappingEndEvent"):
            anchor, before = around.pop()
            if anchor:
                sizes[anchor] = count - before
        elif kind == "AliasEvent":
            if any(anchor == event.anchor for anchor, _ in around):
                raise _error(path, position, f"*{event.anchor} stands within what it names; write it out")
            count += sizes.get(event.anchor, 1)
        elif kind in ("ScalarEvent", "SequenceStartEvent", "MappingStartEvent"):
            if event.tag and not tags:
                raise _error(path, position, f"the tag {_short(str(event.tag))} cannot stand in settings; leave it out")
            if kind == "ScalarEvent" and event.anchor:
                sizes[event.anchor] = 1
            elif kind != "ScalarEvent":
                around.append((event.anchor, count))
            count += 1
        if len(around) > MAX_DEPTH:
            raise _error(path, position, f"more than {MAX_DEPTH} levels within each other; settings have fewer")
        if count > MAX_VALUES:
            raise _error(path, position, f"more than {MAX_VALUES:,} values, aliases followed; settings have fewer")


def _check_nodes(path: Path, root: Any) -> None:
    """Refuse keys that are no text or stand twice, and values that JSON does not have."""
    todo, seen = [root] if root else [], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        _check_value(path, node)
        if node.tag == f"{_TAG}seq":
            todo += node.value
        elif node.tag == f"{_TAG}map":
            _check_keys(path, [key for key, _ in node.value])
            todo += [part for pair in node.value for part in pair if part.tag != _MERGE]


def _check_value(path: Path, node: Any) -> None:
    position = (node.start_mark.line, node.start_mark.column)
    text = node.value if isinstance(node.value, str) else ""
    if node.tag not in _VALUES:
        kind = node.tag.removeprefix(_TAG)
        raise _error(path, position, f"{_short(text)} is read as a {kind}; write it in quotes")
    if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(text) > _MAX_DIGITS:
        raise _error(path, position, f"a number of {len(text):,} characters; write it shorter, such as 1.0e9")
    if match := _NO_TEXT.search(text):
        raise _error(path, position, f"the text holds the control character U+{ord(match[0]):04X}; take it out")


def _check_keys(path: Path, keys: list[Any]) -> None:
    lines: dict[str, int] = {}
    for key in keys:
        line, column = key.start_mark.line, key.start_mark.column
        if key.tag == _MERGE:
            continue
        if key.tag != f"{_TAG}str":
            text = _short(key.value) if isinstance(key.value, str) else "a list or mapping"
            raise _error(path, (line, column), f"keys are texts, found {text}; write it in quotes")
        if key.value in lines:
            first = lines[key.value] + 1
            problem = f"the key {_short(key.value)} stands here a second time (first in line {first}); keep one"
            raise _error(path, (line, column), problem)
        lines[key.value] = line


def _short(text: str) -> str:
    return text if len(text) <= _MAX_DIGITS else f"{text[:_MAX_DIGITS]}…"
