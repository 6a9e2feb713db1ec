"""Params files as they go wrong: each is refused in one message that names the place, or means what DVC reads in it.

Run: `python -m tests.faults.params_files --count 500`. Half of the files are changed as values (types, ranges, names,
limits that contradict each other), half as text (YAML's oddities, bytes).
"""

import copy
import random
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dvc.exceptions import DvcException
from dvc.fs import LocalFileSystem
from dvc.parsing.context import Context
from dvc.utils.serialize import load_yaml

from storage.files import InputError
from storage.params import Params, load, parse
from tests.clone import ROOT
from tests.faults.forks import Caught
from tests.faults.outcomes import Outcome, Settings, Verdict, run_campaign
from tests.settings import tiny_values

_SECONDS = 10
_MORE_KIB = 1 << 20
_LONGEST_MESSAGE = 5000
_Where = tuple[str | int, ...]


@dataclass(frozen=True)
class _Change:
    """A changed file: its bytes, words of which an error must have one, and whether it has to be refused."""

    story: str
    data: bytes
    places: tuple[str, ...] = ()
    must_fail: bool = False


class TooLongError(BaseException):
    """Reading took longer than allowed."""


# --- changes of values -----------------------------------------------------------------------------------------------

_OTHER_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 0.5),
    *(1.5, -0.0, 1e-320, 1e308, 10**15, 10**16, 2**63, 10**40, 10**4400),
    *(float("inf"), float("-inf"), float("nan"), "", " ", "a", "1", "0x10", "auto", "best", "cpu", "cuda:0"),
    *([], [[]], [1], [1, "a"], ["32/32"], {}),
    *({"a": 1}, {"a": {"b": []}}, "32/0", "1/1/1", "٣", "½", "é" * 200),
    *(
        "🙂",
        "\u202ereversed",
        "a\nb",
        "a\tb",
        "$\\foo$",
        "${targets}",
        "<b>",
        "../..",
        "/",
        "x" * 100_000,
        [0] * 30_000,
    ),
)
_SIMILAR = {"_": "-", "t": "tt", "a": "", "o": "0", "e": "é", "s": "S"}
_LIMITS = ("at_most", "at_least", "at_most_ratio", "at_least_ratio")


def _leaves(values: Any, where: _Where = ()) -> Iterator[_Where]:
    if where:
        yield where
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, (*where, key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _leaves(value, (*where, index))


def _parent_of(values: Any, where: _Where) -> Any:
    for key in where[:-1]:
        values = values[key]
    return values


def _dump(values: Any) -> bytes:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def _names(where: _Where) -> tuple[str, ...]:
    """Return what an error may call a place by: the last two keys on the way to it."""
    return tuple(key for key in where if isinstance(key, str))[-2:]


def _another_value(chance: random.Random, values: Any) -> _Change:
    where = chance.choice(list(_leaves(values)))
    value = chance.choice(_OTHER_VALUES)
    _parent_of(values, where)[where[-1]] = copy.deepcopy(value)
    shown = f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**64 else repr(value)
    return _Change(f"{'.'.join(map(str, where))} = {shown[:60]}", _dump_big(values), (*_names(where), "line"))


def _dump_big(values: Any) -> bytes:
    """Return YAML of values, among which may be numbers that Python refuses to print."""
    big = 10**4400
    text = _dump(_replaced(values, big, "BIG_NUMBER")).decode("utf-8", "surrogatepass")
    return text.replace("BIG_NUMBER", "1" + "0" * 4400).encode("utf-8", "surrogatepass")


def _replaced(values: Any, old: int, new: str) -> Any:
    if isinstance(values, dict):
        return {key: _replaced(value, old, new) for key, value in values.items()}
    if isinstance(values, list):
        return [_replaced(value, old, new) for value in values]
    return new if type(values) is int and values == old else values


def _scaled_number(chance: random.Random, values: Any) -> _Change:
    numbers = [where for where in _leaves(values) if type(_parent_of(values, where)[where[-1]]) in (int, float)]
    where = chance.choice(numbers)
    parent, factor = _parent_of(values, where), chance.choice((-1, 0, 0.5, 2, 3, 7, 1000, 1e12, 1e300))
    parent[where[-1]] = type(parent[where[-1]])(parent[where[-1]] * factor)
    return _Change(f"{'.'.join(map(str, where))} times {factor}", _dump(values), (*_names(where), "line"))


def _misspelt_key(chance: random.Random, values: Any) -> _Change:
    keys = [
        where
        for where in _leaves(values)
        if isinstance(where[-1], str) and not {"constraints", "variant_tokens", "learning_rates"} & {*where[-2:-1]}
    ]
    where = chance.choice([where for where in keys if where[0] != "targets" or len(where) > 2])
    parent, key = _parent_of(values, where), str(where[-1])
    letter = chance.choice([letter for letter in key if letter in _SIMILAR] or [key[0]])
    new = key.replace(letter, _SIMILAR.get(letter, letter * 2), 1)
    items = [(new if name == key else name, value) for name, value in parent.items()]
    parent.clear()
    parent.update(items)
    return _Change(f"{'.'.join(map(str, where))} misspelt {new}", _dump(values), (new, key), must_fail=True)


def _removed_section(chance: random.Random, values: Any) -> _Change:
    name = chance.choice(list(values))
    del values[name]
    return _Change(f"without {name}", _dump(values), (name,), must_fail=True)


def _contradiction(chance: random.Random, values: Any) -> _Change:
    """Make two limits in one constraint, none, a budget above its split, or two targets with one label."""
    target = chance.choice(list(values["targets"]))
    constraints = values["targets"][target]["constraints"]
    name = chance.choice(list(constraints))
    match chance.randrange(5):
        case 0:
            constraints[name] |= dict.fromkeys(chance.sample(_LIMITS, 3), 0.5)
            story = f"several limits in {name}"
        case 1:
            constraints[name] = {key: value for key, value in constraints[name].items() if key not in _LIMITS}
            story = f"no limit in {name}"
        case 2:
            section = chance.choice(("score_blocks", "distill_child", "evaluate_child"))
            values[section]["tokens"] = 2**40
            return _Change(f"{section}.tokens above its split", _dump(values), (f"{section}.tokens",), must_fail=True)
        case 3:
            values["targets"]["another"] = copy.deepcopy(values["targets"][target])
            return _Change("two targets with one label", _dump(values), ("label",), must_fail=True)
        case _:
            constraints[name] = {"metric": "decode_throughput", "at_most": 5}
            story = f"a throughput at most in {name}"
    return _Change(story, _dump(values), (name,), must_fail=True)


# --- changes of text -------------------------------------------------------------------------------------------------

_SCALARS = (
    *("010", "0o17", "0x1F", "1:30", "12:30:45", "1_000", ".5"),
    *("+1", "1e3", "1.0e+3", "~", "yes", "no", "on", "off"),
    *(
        "2026-01-01",
        "2026-01-01T00:00:00Z",
        ".inf",
        "-.INF",
        ".nan",
        "!!str 1",
        "!!int '1'",
        "!!binary aGk=",
        "!!set {a}",
    ),
    *("!!python/object/apply:os.system [id]", "!<tag:x> 1", "&a 1", "*missing"),
    *("[1, 2", "{a: 1", "'a", '"\\x00"'),
    *('"\\ud800"', "| \n   text", "> \n   text", "@a", "`a`"),
    *("%a", "? a", "- - 1", "a: b: c", "1" * 5000, "1e99999"),
    *("<<", "=", "null null", "#", "١٢", "1\u00a0000", "“auto”", "\u200b1"),
)
_PIECES = (
    *(
        b"\x00",
        b"\xff",
        b"\xfe\xff",
        b"\xed\xa0\x80",
        b"\xc3",
        b"\x1b[2J",
        b"\t",
        b"\r",
        b"\x85",
        b"\xe2\x80\xa8",
        b"\xef\xbb\xbf",
    ),
    *(
        b"---\n",
        b"...\n",
        b"%YAML 1.1\n---\n",
        b"%TAG ! tag:x,2000:\n---\n",
        b"<<: {run: {seed: 1}}\n",
        b"run: {}\n",
        b"? [a]\n: 1\n",
    ),
    *(
        b"1: 2\n",
        b"null: 1\n",
        b"true: 1\n",
        b"'': 1\n",
        b"a.b: 1\n",
        b"&a a: *a\n",
        b"- 1\n",
        b": \n",
        b"x: &x [*x]\n",
        b"#\n",
    ),
    *(b"a: " + b"[" * 400 + b"]" * 400 + b"\n", b"a: " + b"{b: " * 200 + b"1" + b"}" * 200 + b"\n"),
    *(
        b"deep: " + b"[" * 40_000,
        b"a: " + b"9" * 100_000 + b"\n",
        b"long: " + b"x" * 3_000_000 + b"\n",
        b"#" * 2_000_000,
    ),
)
_LAUGHS = b"".join(
    b"%c: &%c [%s]\n" % (97 + level, 97 + level, b", ".join([b"*%c" % (96 + level) if level else b"lol"] * 9))
    for level in range(12)
)


def _odd_scalar(chance: random.Random, text: str) -> _Change:
    lines = text.splitlines(keepends=True)
    number = chance.choice([index for index, line in enumerate(lines) if line.startswith("  ") and ": " in line])
    key = lines[number].split(":")[0]
    scalar = chance.choice(_SCALARS)
    lines[number] = f"{key}: {scalar}\n"
    words = (key.strip().strip("-{ "), "line", "parent", "sources", "targets")
    return _Change(f"{key.strip()}: {scalar[:40]!r}", "".join(lines).encode("utf-8", "surrogatepass"), words)


def _inserted_piece(chance: random.Random, text: str) -> _Change:
    data, piece = text.encode(), chance.choice((*_PIECES, _LAUGHS))
    ends = [0, *(index + 1 for index, byte in enumerate(data) if byte == 10)]
    position = chance.choice(ends) if chance.random() < 0.7 else chance.randrange(len(data))
    return _Change(f"{piece[:24]!r} at byte {position}", data[:position] + piece + data[position:])


def _changed_lines(chance: random.Random, text: str) -> _Change:
    lines = text.splitlines(keepends=True)
    first, second = sorted(chance.sample(range(len(lines)), 2))
    match chance.randrange(5):
        case 0:
            lines.insert(second, lines[first])
        case 1:
            lines[first], lines[second] = lines[second], lines[first]
        case 2:
            del lines[first : first + chance.randint(1, 4)]
        case 3:
            lines[first] = chance.choice((" ", "   ", "\t")) + lines[first]
        case _:
            lines = lines[:first]
    return _Change(f"lines {first + 1} and {second + 1}", "".join(lines).encode())


def _changed_bytes(chance: random.Random, text: str) -> _Change:
    data = bytearray(text.encode())
    for _ in range(chance.choice((1, 1, 1, 4, 32))):
        position = chance.randrange(len(data))
        match chance.randrange(3):
            case 0:
                data[position] ^= 1 << chance.randrange(8)
            case 1:
                del data[position]
            case _:
                data.insert(position, chance.randrange(256))
    return _Change(f"{len(data)} bytes, some changed", bytes(data))


def _another_encoding(chance: random.Random, text: str) -> _Change:
    name = chance.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp1252"))
    line_ends = chance.choice(("\n", "\r\n", "\r"))
    return _Change(f"{name}, lines end in {line_ends!r}", f"# Größe\n{text}".replace("\n", line_ends).encode(name))


def _another_file(chance: random.Random, _text: str) -> _Change:
    data = chance.choice(
        (b"", b"\n", b"# nothing\n", b"[]", b"1", b"text", b"null", b"---\n---\n", b"{", b"\x89PNG", b"\x00" * 99)
    )
    return _Change(f"the file is {data[:12]!r}", data, must_fail=True)


_OF_VALUES: dict[str, Callable[[random.Random, Any], _Change]] = {
    "another value": _another_value,
    "a number scaled": _scaled_number,
    "a misspelt key": _misspelt_key,
    "a section less": _removed_section,
    "a contradiction": _contradiction,
}
_OF_TEXT: dict[str, Callable[[random.Random, str], _Change]] = {
    "an odd scalar": _odd_scalar,
    "a piece of YAML": _inserted_piece,
    "other lines": _changed_lines,
    "other bytes": _changed_bytes,
    "another encoding": _another_encoding,
    "another file": _another_file,
}
_WEIGHTS = {"another value": 6, "an odd scalar": 4, "a piece of YAML": 3, "other bytes": 3, "other lines": 2}


# --- what becomes of them --------------------------------------------------------------------------------------------


def faults(settings: Settings) -> Iterator[Outcome]:
    """Change a params file and read it."""
    kinds = [kind for kind in (*_OF_VALUES, *_OF_TEXT) for _ in range(_WEIGHTS.get(kind, 1))]
    starts = [(ROOT / "params.yaml").read_text(encoding="utf-8"), _dump(tiny_values()).decode()]
    path = settings.scratch / "params.yaml"
    for number in range(settings.count):
        chance = settings.chance(number)
        kind, start = chance.choice(kinds), chance.choice(starts)
        change = (
            _OF_VALUES[kind](chance, yaml.safe_load(start)) if kind in _OF_VALUES else _OF_TEXT[kind](chance, start)
        )
        path.write_bytes(change.data)
        verdict, words = _read(path, change)
        yield Outcome(kind, verdict, f"fault {number}: {change.story} -> {words}")


def _read(path: Path, change: _Change) -> tuple[Verdict, str]:
    """Read a changed file in a bounded time; what DVC reads in it is compared where it is taken."""
    signal.signal(signal.SIGALRM, _too_long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(_SECONDS)
    with Caught() as caught:
        params = load(path)
    signal.alarm(0)
    more, error = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, caught.error
    if isinstance(error, TooLongError) or more > _MORE_KIB:
        return "hang", f"it took {_SECONDS} s or {more >> 10} MiB"
    if isinstance(error, InputError):
        return ("right" if _is_clear(str(error), path, change) else "wrong"), str(error)[:300]
    if error is not None:
        return "traceback", f"{type(error).__name__}: {str(error)[:200]}"
    return ("wrong", "taken") if change.must_fail else _compared(path, params)


def _too_long(_signal: int, _frame: object) -> None:
    raise TooLongError


def _is_clear(message: str, path: Path, change: _Change) -> bool:
    """Tell whether a message is short, and names the file and the place."""
    names_place = not change.places or any(word in message for word in change.places)
    return path.name in message and names_place and len(message) < _LONGEST_MESSAGE


def _compared(path: Path, params: Params) -> tuple[Verdict, str]:
    """Tell whether DVC reads the same in a file that was taken."""
    try:
        read_by_dvc = load_yaml(str(path))
        Context.load_from(LocalFileSystem(), str(path))
    except (DvcException, ValueError) as error:
        return "wrong", f"taken, and DVC refuses it: {str(error)[:200]}"
    same = parse(read_by_dvc, str(path)) == params
    return ("right", "taken as DVC reads it") if same else ("wrong", "taken, and DVC reads other values")


if __name__ == "__main__":
    run_campaign("params_files", "Params files as they go wrong, read.", 500, faults)
