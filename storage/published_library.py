"""A block library in the form in which others publish them: one JSON file, no weights.

    {"layer_0": {"<variant>": {"stats": {"memory_mib": 12.5, "runtime_ms": 0.8}, "metrics": {"kl_div": 0.02}}, ...}}

In: such a file, from anyone. Out: its variants, checked. `stats` add up over layers (bytes, milliseconds, parameters);
`metrics` say what quality is lost when one layer is replaced, lower is better. This project's own replacement library,
with weights, is storage/library.py.
"""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.config_fields import MAX_BLOCKS, is_number
from storage.files import InputError, to_run
from storage.json_files import read_object

MAX_NUMBER = 1e30
"""No stat, metric or limit is larger: sums and products of such numbers stay finite."""
_MAX_BYTES = 1 << 28
_WAY_OUT = "the download again, or correct --block-library"
_MAX_SHOWN = 9
"""Missing layers that a message names."""


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
            gap, a layer has no variant, variants differ in their stats or metrics, or a number is none, negative or
            beyond MAX_NUMBER. The message says where.
    """
    content = read_object(path, _WAY_OUT, _MAX_BYTES)
    if not content:
        raise InputError(f'{path}: expected {{"layer_0": {{...}}, ...}}, found an empty object; {to_run(_WAY_OUT)}')
    layers = {_layer_number(name, path): variants for name, variants in content.items()}
    if sorted(layers) != list(range(len(layers))):
        missing = sorted({*range(max(layers) + 1)} - {*layers})
        shown = [*map(str, missing[:_MAX_SHOWN]), *["..."] * (len(missing) > _MAX_SHOWN)]
        raise InputError(f"{path}: layers {', '.join(shown)} are missing between 0 and {max(layers)}; add them")
    result = []
    for layer, variants in sorted(layers.items()):
        where = f"{path}: layer_{layer}"
        for name, variant in sorted(_object(variants, where).items()):
            result.append(_variant(layer, name, variant, f"{where}[{name!r}]"))
    _check_alike(result, path)
    return tuple(result)


def _layer_number(name: str, path: Path) -> int:
    match = re.fullmatch(r"layer_(0|[1-9][0-9]{0,8})", name)
    if not match or int(match[1]) >= MAX_BLOCKS:
        most = f"layer_{MAX_BLOCKS - 1} at most"
        raise InputError(f"{path}: expected names layer_0, layer_1, ..., {most}, found {_shown(name)}; correct it")
    return int(match[1])


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where}: expected an object that is not empty, found {_shown(value)}; correct it")
    return value


def _variant(layer: int, name: str, content: Any, where: str) -> PublishedVariant:
    parts = _object(content, where)
    stats = _numbers(parts.get("stats"), f"{where}.stats", least=0)
    metrics = _numbers(parts.get("metrics"), f"{where}.metrics", least=-MAX_NUMBER)
    return PublishedVariant(layer, name, stats, metrics)


def _numbers(value: Any, where: str, least: float) -> dict[str, float]:
    numbers = _object(value, where)
    for name, number in numbers.items():
        if not is_number(number) or not least <= number <= MAX_NUMBER:
            bounds = f"at least {least:g} and at most {MAX_NUMBER:g}"
            raise InputError(f"{where}.{name}: expected a number {bounds}, found {_shown(number)}; correct it")
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
    """Return the value for people: short, however large or deep it is."""
    return "nothing" if value is None else reprlib.repr(value)
