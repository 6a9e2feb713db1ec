"""The table of metrics: formulas by hand, and which way a metric is better."""

import math

import pytest
from pydantic import TypeAdapter, ValidationError

from storage.metrics import METRICS, BlockCount, Metric, MetricName, SizeParts, SpeedParts

SPEEDS = {
    "throughput": 1e3 * 4 * 10 / (30.0 + 10 * 2.0),
    "decode_throughput": 1e3 * 4 / 2.0,
    "latency_ms": 30.0 + 10 * 2.0,
    "time_to_first_token_ms": 30.0,
    "time_per_token_ms": 2.0,
}
"""A batch of 4 that is read in 30 ms and then takes 10 steps of 2 ms."""
SIZES = {
    "params": 100,
    "block_params": 100,
    "weight_bytes": 200,
    "kv_bytes": 8,
    "memory_gib": (200 + 3 * 8) / 2 / 2**30,
}
"""100 parameters in 200 bytes and 8 bytes of KV cache a token; memory of 3 tokens on each of two devices."""


def test_every_metric_is_a_speed_a_size_or_a_count() -> None:
    counts = {name for name, metric in METRICS.items() if isinstance(metric.parts, BlockCount)}
    assert {*SPEEDS, *SIZES, *counts} == METRICS.keys()


@pytest.mark.parametrize("name", SPEEDS)
def test_speeds_by_hand(name: str) -> None:
    parts = METRICS[name].parts
    assert isinstance(parts, SpeedParts)
    assert parts.value(30.0, 2.0, 10, 4) == pytest.approx(SPEEDS[name])
    assert not parts.per_second or parts.value(0.0, 0.0, 10, 4) == math.inf


@pytest.mark.parametrize("name", SIZES)
def test_sizes_by_hand(name: str) -> None:
    parts = METRICS[name].parts
    assert isinstance(parts, SizeParts)
    value = parts.value(parts.total(100, 200, 8, 3), tensor_parallel=2)
    assert value == SIZES[name]
    assert isinstance(value, int) == (name != "memory_gib")


@pytest.mark.parametrize("metric", [metric for metric in METRICS.values() if metric.speed], ids=str)
def test_a_child_that_takes_half_the_time_is_twice_as_fast(metric: Metric) -> None:
    assert metric.speed is not None
    parent, child = metric.speed.value(30.0, 2.0, 10, 4), metric.speed.value(15.0, 1.0, 10, 4)
    assert metric.speed_up(child, parent) == pytest.approx(2.0)
    assert metric.more_is_better == (child > parent) == (metric.direction == "at_least")


def test_a_name_that_is_no_metric_is_refused_with_the_nearest() -> None:
    names = TypeAdapter(MetricName)
    assert names.validate_python("kv_bytes") == "kv_bytes"
    assert names.json_schema()["enum"] == list(METRICS)
    with pytest.raises(ValidationError, match="unknown metric, did you mean kv_bytes"):
        names.validate_python("kv_byte")
