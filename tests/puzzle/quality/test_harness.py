"""Metrics of our own against numbers counted by hand."""

import math

import pytest

from tasks.puzzle.quality.harness import probability_of_true, rouge_l


def test_rouge_l_is_f1_of_the_longest_common_subsequence() -> None:
    """Of `police killed the gunman` the other has `police the gunman`: 3 of 4 words, and 3 of its own 4."""
    assert rouge_l(["police killed the gunman"], ["police kill the gunman"]) == pytest.approx(0.75)
    assert rouge_l(["one two three"], ["one two three"]) == 1
    assert rouge_l(["one two three"], ["four"]) == 0


def test_the_probability_of_true_answers_is_normalised_over_all() -> None:
    answers = [(math.log(0.3), False), (math.log(0.1), False), (math.log(0.2), True)]
    assert probability_of_true({"mc2_labels": [1, 0, 1]}, answers) == {"acc": pytest.approx(0.5 / 0.6)}
    from_hub = {"mc2_targets": {"labels": [0, 1, 0]}, "mc1_targets": {"labels": [1, 0]}}
    assert probability_of_true(from_hub, answers) == {"acc": pytest.approx(0.1 / 0.6)}
