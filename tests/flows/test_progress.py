"""Progress with time left, from DVC's own lines."""

import pytest

from flows.progress import Stages, span


def test_stages_count_and_time_left_follow_dvcs_lines() -> None:
    stages = Stages(["distill", "search@a", "evaluate@a"], {"distill": 100.0, "search@a": 10.0, "evaluate@a": 50.0})
    stages.read("Stage 'prepare' didn't change, skipping", 0.0)  # not among those ahead
    assert (stages.percent(None), stages.seconds_left(None, 0.0)) == (0.0, (160.0, True))
    stages.read("Running stage 'distill':", 10.0)
    stages.read("> python -m flows.distill", 10.0)
    assert stages.seconds_left(None, 40.0) == (130.0, True)  # 30 of its usual 100 s are over
    assert stages.seconds_left(25.0, 40.0) == (150.0, True)  # its pieces say 30 s of 120
    assert stages.percent(25.0) == pytest.approx(100 / 12)
    assert stages.text(25.0, "block 5/20", 40.0) == "0/3 stages · distill (block 5/20) · about 2 min left"
    stages.read("Stage 'search@a' is cached - skipping run, checking out outputs", 50.0)
    stages.read("Running stage 'evaluate@a':", 60.0)
    assert stages.percent(None) == pytest.approx(200 / 3)
    assert stages.seconds_left(None, 200.0) == (0.0, True)  # late, but never less than nothing
    stages.finish(201.0)
    assert (stages.percent(None), stages.seconds_left(None, 201.0)) == (100.0, (0.0, True))


def test_a_stage_without_history_makes_the_time_a_lower_bound() -> None:
    stages = Stages(["search@a", "evaluate@a", "evaluate@b"], {"search@a": 10.0})
    assert stages.seconds_left(None, 0.0) == (10.0, False)
    assert "more than 10 s left" in stages.text(None, "", 0.0)
    stages.read("Running stage 'search@a':", 0.0)
    assert stages.text(None, "", 20.0) == "0/3 stages · search@a · time left not known yet"
    stages.read("Running stage 'evaluate@a':", 20.0)
    assert stages.seconds_left(50.0, 25.0) == (5.0, False)  # its pieces say so
    stages.read("Running stage 'evaluate@b':", 30.0)
    assert stages.seconds_left(None, 32.0) == (8.0, True)  # as long as the other target's took


def test_nothing_ahead_is_done() -> None:
    assert Stages([], {}).percent(None) == 100.0


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5939, "99 min"), (7500, "2 h 05 min")]
)
def test_spans(seconds: float, said: str) -> None:
    assert span(seconds) == said
