"""Published block libraries: what is read, and one clear error for each way to be wrong."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from storage.files import InputError
from storage.published_library import read_published_library


def variant(**changes: Any) -> dict[str, Any]:
    return {"stats": {"memory_mib": 2.0, "runtime_ms": 1.0}, "metrics": {"kl_div": 0.1}, **changes}


GOOD = {"layer_0": {"b": variant(), "a": variant()}, "layer_1": {"a": variant()}}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_variants_come_by_layer_and_name(tmp_path: Path) -> None:
    variants = read_published_library(write(tmp_path / "lib.json", GOOD))
    assert [(variant.layer, variant.name) for variant in variants] == [(0, "a"), (0, "b"), (1, "a")]
    assert variants[0].stats == {"memory_mib": 2.0, "runtime_ms": 1.0}
    assert variants[0].metrics == {"kl_div": 0.1}
    assert variants[2].parent_blocks == range(1, 2)


def test_metrics_may_be_negative(tmp_path: Path) -> None:
    content = {"layer_0": {"a": variant(metrics={"score": -0.5})}}
    (only,) = read_published_library(write(tmp_path / "lib.stats.json", content))
    assert only.metrics == {"score": -0.5}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "lib.json is not valid JSON .*; run the download again, or correct --block-library"),
        ('{"layer_0": ' + "[" * 100_000, "lie too deep in each other"),
        ({"layer_" + "9" * 5000: {}}, "layer_9999 at most, found 'layer_9"),
        ({"layer_300000000": {"a": variant()}}, "layer_9999 at most, found 'layer_300000000'"),
        ({"layer_50": {"a": variant()}}, r"layers 0, 1, 2, 3, 4, 5, 6, 7, 8, \.\.\. are missing between 0 and 50; add"),
        ({"layer_0": {"a": variant(stats={"runtime_ms": 10**400})}}, "a number of 401 digits"),
        (
            {"layer_0": {"a": variant(stats={"x": 1.7e308})}},
            r"layer_0\['a'\].stats.x: .* at most 1e\+30, found 1.7e\+308",
        ),
        (
            {"layer_0": {"a": variant(metrics={"x": -1e308})}},
            r"\['a'\].metrics.x: .* at least -1e\+30 .*, found -1e\+308",
        ),
        ([], "expected"),
        ({}, "expected"),
        ({"layer_0": {"a": variant()}, "layer_2": {"a": variant()}}, "layers 1 are missing between 0 and 2"),
        ({"block_0": {"a": variant()}}, "expected names layer_0, layer_1, ..., layer_9999 at most, found 'block_0'"),
        ({"layer_0": {}}, "layer_0: expected an object that is not empty"),
        ({"layer_0": {"a": {"stats": {"runtime_ms": 1}}}}, r"layer_0\['a'\].metrics: expected an object"),
        ({"layer_0": {"a": variant(stats={"runtime_ms": -1.0})}}, r"stats.runtime_ms: expected .*, found -1.0"),
        ({"layer_0": {"a": variant(stats={"runtime_ms": "1 ms"})}}, "found '1 ms'"),
        ('{"layer_0": {"a": {"stats": {"runtime_ms": NaN}, "metrics": {"kl_div": 0}}}}', "NaN is no number"),
        (
            '{"layer_0": {"a": {"stats": {"x": 1, "x": 2}, "metrics": {"kl_div": 0}}}}',
            "the key 'x' stands in an object twice",
        ),
        (
            {"layer_0": {"a": variant()}, "layer_1": {"a": variant(stats={"runtime_ms": 1.0})}},
            r"layer_1\['a'\] and layer_0\['a'\] differ in their stats: memory_mib",
        ),
    ],
)
def test_a_wrong_file_gets_one_error_that_says_where(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_published_library(write(tmp_path / "lib.json", content))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.json is missing; run the download again, or correct --block-library"):
        read_published_library(tmp_path / "none.json")


def test_a_layer_of_many_variants_is_read_at_once(tmp_path: Path) -> None:
    """A count of each name among all names took 26 seconds for these."""
    path = write(tmp_path / "lib.json", {"layer_0": {f"v{number}": variant() for number in range(40_000)}})
    began = time.monotonic()
    assert len(read_published_library(path)) == 40_000
    assert time.monotonic() - began < 10
