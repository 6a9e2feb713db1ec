"""Lines through noisy points, parts scaled to a whole, and the context of a workload."""

import pytest

from storage.scenario import Scenario
from tasks.engines.timings import Timing, Workload, fit_to_whole, line


def test_decoding_is_timed_halfway_through_the_answer() -> None:
    assert Workload(Scenario(16, 9), batch=2).context_at_midpoint == 20


def test_one_wild_point_does_not_bend_the_line() -> None:
    fitted = line([1, 2, 3, 4, 5], [10.0, 20.0, 90.0, 40.0, 50.0])
    assert fitted(3) == pytest.approx(30.0)
    assert line([1, 2, 3], [3.0, 2.0, 1.0])(2) == pytest.approx(2.0)  # never cheaper where it is wider


def test_parts_are_made_to_sum_to_the_whole() -> None:
    """3 x 2 + 1 = 7 ms of parts in a whole of 10.5: half as much again. In one of 3.5: everything at half."""
    parts = {"block": Timing(2.0, 2.0, 0.1), "head": Timing(1.0, 1.0, 0.1), "other": Timing(8.0, 8.0, 0.1)}
    fit = fit_to_whole(parts, {"block": 3, "head": 1}, Timing(10.5, 3.5, 0.2))
    assert fit.parts["other"] == Timing(12.0, 4.0, 0.1)
    assert "prefill x 1.500 and decode x 0.500" in fit.text
    assert 3 * fit.parts["block"].prefill_ms + fit.parts["head"].prefill_ms == 10.5
    assert 3 * fit.parts["block"].decode_ms + fit.parts["head"].decode_ms == 3.5
