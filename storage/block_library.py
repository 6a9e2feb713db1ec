"""A block library in the form in which the field publishes them: one JSON file, no weights.

    {"layer_0": {"<variant>": {"stats": {"memory_mib": 12.5, "runtime_ms": 0.8}, "metrics": {"kl_div": 0.02}}, ...}}

In: such a file, from anyone. Out: its variants, checked. `stats` add up over layers (bytes, milliseconds, parameters);
`metrics` say what quality is lost when one layer is replaced, lower is better.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.files import InputError


@dataclass(frozen=True)
class LibraryVariant:
    """One alternative for one layer; its stats and metrics by name."""

    layer: int
    name: str
    stats: Mapping[str, float]
    metrics: Mapping[str, float]


def read_block_library(path: Path) -> tuple[LibraryVariant, ...]:
    """The variants of all layers, sorted by layer and name.

    Raises:
        InputError: the file is missing or not JSON, a name comes twice, layers are not layer_0, layer_1, ... without a
            gap, a layer has no variant, variants differ in their stats or metrics, or a number is none, negative or not
            finite. The message says where.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(pairs, path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f'{path}: expected {{"layer_0": {{...}}, ...}}, found {_shown(found)}')
    layers = {_layer(name, path): (name, variants) for name, variants in found.items()}
    if sorted(layers) != list(range(len(layers))):
        missing = sorted({*range(max(layers) + 1)} - {*layers})
        raise InputError(f"{path}: layers {', '.join(map(str, missing))} are missing between 0 and {max(layers)}")
    result = [
        _variant(layer, name, content, f"{path}: {text}[{name!r}]")
        for layer, (text, variants) in sorted(layers.items())
        for name, content in sorted(_object(variants, f"{path}: {text}").items())
    ]
    _check_alike(result, path)
    return tuple(result)


def _once(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: {', '.join(sorted(twice))} comes twice in one object; keep one")
    return dict(pairs)


def _layer(name: str, path: Path) -> int:
    match = re.fullmatch(r"layer_(0|[1-9]\d*)", name)
    if not match:
        raise InputError(f"{path}: expected names layer_0, layer_1, ..., found {name!r}")
    return int(match[1])


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where}: expected an object that is not empty, found {_shown(value)}")
    return value


def _variant(layer: int, name: str, content: Any, where: str) -> LibraryVariant:
    parts = _object(content, where)
    stats, metrics = (_numbers(parts.get(part), f"{where}.{part}") for part in ("stats", "metrics"))
    return LibraryVariant(layer, name, stats, metrics)


def _numbers(value: Any, where: str) -> dict[str, float]:
    numbers = _object(value, where)
    for name, number in numbers.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number) or (number < 0 and ".stats" in where):
            raise InputError(f"{where}.{name}: expected a finite number, stats at least 0, found {_shown(number)}")
    return {name: float(number) for name, number in numbers.items()}


def _check_alike(variants: list[LibraryVariant], path: Path) -> None:
    """A sum over layers means something only if every variant has the number."""
    first = variants[0]
    for one in variants:
        for kind, own, names in (
            ("stats", one.stats, first.stats),
            ("metrics", one.metrics, first.metrics),
        ):
            if own.keys() != names.keys():
                differ = sorted(own.keys() ^ names.keys())
                raise InputError(
                    f"{path}: layer_{one.layer}[{one.name!r}] and layer_{first.layer}[{first.name!r}] differ in their "
                    f"{kind}: {', '.join(differ)}; every variant needs them all"
                )


def _shown(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
