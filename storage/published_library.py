"""A block library in the form in which others publish them: one JSON file, no weights.

    {"layer_0": {"<variant>": {"stats": {"memory_mib": 12.5, "runtime_ms": 0.8}, "metrics": {"kl_div": 0.02}}, ...}}

In: such a file, from anyone. Out: its variants, checked. `stats` add up over layers (bytes, milliseconds, parameters);
`metrics` say what quality is lost when one layer is replaced, lower is better. This project's own replacement library,
with weights, is storage/library.py.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.files import InputError


@dataclass(frozen=True, order=True)
class PublishedVariant:
    """One alternative for one layer, its stats and its metrics by name; ordered by layer and name."""

    layer: int
    name: str
    stats: Mapping[str, float] = field(compare=False)
    metrics: Mapping[str, float] = field(compare=False)

    @property
    def parent_blocks(self) -> range:
        """Return the one block of the parent that it replaces, its layer."""
        return range(self.layer, self.layer + 1)


def read_published_library(path: Path) -> tuple[PublishedVariant, ...]:
    """Read the variants of all layers, sorted by layer and name.

    Raises:
        InputError: the file is missing or not JSON, a name comes twice, layers are not layer_0, layer_1, ... without a
            gap, a layer has no variant, variants differ in their stats or metrics, or a number is none, negative or not
            finite. The message says where.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path}: expected {{"layer_0": {{...}}, ...}}, found {_shown(content)}')
    layers = {_layer_number(name, path): variants for name, variants in content.items()}
    if sorted(layers) != list(range(len(layers))):
        missing = sorted({*range(max(layers) + 1)} - {*layers})
        raise InputError(f"{path}: layers {', '.join(map(str, missing))} are missing between 0 and {max(layers)}")
    result = []
    for layer, variants in sorted(layers.items()):
        where = f"{path}: layer_{layer}"
        for name, variant in sorted(_object(variants, where).items()):
            result.append(_variant(layer, name, variant, f"{where}[{name!r}]"))
    _check_alike(result, path)
    return tuple(result)


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """Return the object of these pairs of name and value; InputError where a name comes twice."""
    names = [name for name, _ in pairs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: {', '.join(sorted(repeated))} comes twice in one object; keep one")
    return dict(pairs)


def _layer_number(name: str, path: Path) -> int:
    match = re.fullmatch(r"layer_(0|[1-9]\d*)", name)
    if not match:
        raise InputError(f"{path}: expected names layer_0, layer_1, ..., found {name!r}")
    return int(match[1])


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where}: expected an object that is not empty, found {_shown(value)}")
    return value


def _variant(layer: int, name: str, content: Any, where: str) -> PublishedVariant:
    parts = _object(content, where)
    stats = _numbers(parts.get("stats"), f"{where}.stats", least=0)
    metrics = _numbers(parts.get("metrics"), f"{where}.metrics", least=-math.inf)
    return PublishedVariant(layer, name, stats, metrics)


def _numbers(value: Any, where: str, least: float) -> dict[str, float]:
    numbers = _object(value, where)
    for name, number in numbers.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number) or number < least:
            raise InputError(f"{where}.{name}: expected a finite number, stats at least 0, found {_shown(number)}")
    return {name: float(number) for name, number in numbers.items()}


def _check_alike(variants: list[PublishedVariant], path: Path) -> None:
    """Raise InputError unless all variants have the same stats and metrics, since only then a sum means something."""
    first = variants[0]
    for variant in variants:
        pairs = (("stats", variant.stats, first.stats), ("metrics", variant.metrics, first.metrics))
        for kind, numbers, first_numbers in pairs:
            if differing := sorted(numbers.keys() ^ first_numbers.keys()):
                raise InputError(
                    f"{path}: layer_{variant.layer}[{variant.name!r}] and layer_{first.layer}[{first.name!r}] differ "
                    f"in their {kind}: {', '.join(differing)}; every variant needs them all"
                )


def _shown(value: Any) -> str:
    """Return the value as JSON has it, cut off where it is long."""
    text = json.dumps(value) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
