"""Progress with time left, from DVC's own lines."""

import pytest

from flows.ui.dvc_progress import DvcProgress


def test_stages_count_and_time_left_follow_dvcs_lines() -> None:
    progress = DvcProgress(
        ["distill", "search@a", "evaluate@a"], {"distill": 100.0, "search@a": 10.0, "evaluate@a": 50.0}
    )
    progress.read("Stage 'prepare' didn't change, skipping", 0.0)  # not among those ahead
    assert (progress.percent(None), progress.seconds_left(None, 0.0)) == (0.0, (160.0, True))
    progress.read("Running stage 'distill':", 10.0)
    progress.read("> python -m flows.distill", 10.0)
    assert progress.seconds_left(None, 40.0) == (130.0, True)  # 30 of its usual 100 s are over
    assert progress.seconds_left(25.0, 40.0) == (150.0, True)  # its pieces say 30 s of 120
    assert progress.percent(25.0) == pytest.approx(100 / 12)
    assert progress.text(25.0, "block 5/20", 40.0) == "0/3 stages · distill (block 5/20) · about 2 min left"
    progress.read("Stage 'search@a' is cached - skipping run, checking out outputs", 50.0)
    progress.read("Running stage 'evaluate@a':", 60.0)
    assert progress.percent(None) == pytest.approx(200 / 3)
    assert progress.seconds_left(None, 200.0) == (0.0, True)  # late, but never less than nothing
    progress.finish(201.0)
    assert (progress.percent(None), progress.seconds_left(None, 201.0)) == (100.0, (0.0, True))


def test_a_stage_without_history_makes_the_time_a_lower_bound() -> None:
    progress = DvcProgress(["search@a", "evaluate@a", "evaluate@b"], {"search@a": 10.0})
    assert progress.seconds_left(None, 0.0) == (10.0, False)
    assert "more than 10 s left" in progress.text(None, "", 0.0)
    progress.read("Running stage 'search@a':", 0.0)
    assert progress.text(None, "", 20.0) == "0/3 stages · search@a · time left not known yet"
    progress.read("Running stage 'evaluate@a':", 20.0)
    assert progress.seconds_left(50.0, 25.0) == (5.0, False)  # its pieces say so
    progress.read("Running stage 'evaluate@b':", 30.0)
    assert progress.seconds_left(None, 32.0) == (8.0, True)  # as long as the other target's took


def test_nothing_ahead_is_done() -> None:
    assert DvcProgress([], {}).percent(None) == 100.0
