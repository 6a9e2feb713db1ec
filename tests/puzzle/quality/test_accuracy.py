"""Accuracy against hand-counted answers: paired differences, what is preserved, a parent at chance, the table."""

import math
import statistics

import pytest

from tasks.puzzle.quality.accuracy import Answers, TaskAccuracy, accuracy_table, compare

RIGHT = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
WORSE = (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0)


def answers(right: tuple[float, ...], choices: int = 4, prompt: str = "question") -> Answers:
    return Answers(tuple(f"{prompt} {i}" for i in range(len(right))), right, (1 / choices,) * len(right))


def test_a_child_is_paired_with_its_parent() -> None:
    comparison = compare({"parent": answers(RIGHT), "assembled": answers(WORSE)})
    parent, child = comparison.parent, comparison.children["assembled"]
    assert (comparison.questions, comparison.chance, comparison.parent_at_chance) == (8, 0.25, False)
    assert parent.accuracy == 7 / 8
    assert parent.stderr == pytest.approx(math.sqrt(7 / 8 * 1 / 8 / 7))
    assert child.accuracy == 6 / 8
    differences = [0, 0, 0, 0, 0, -1, -1, 1]
    assert child.difference == pytest.approx(-1 / 8)
    assert child.difference_stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(8))
    assert child.accuracy_preserved == pytest.approx(6 / 7)


def test_the_form_of_accuracy_json() -> None:
    written = compare({"parent": answers(RIGHT), "assembled": answers(WORSE)}).to_json()
    assert list(written) == ["questions", "asked", "chance", "parent_at_chance", "models"]
    models = written["models"]
    assert isinstance(models, dict)
    assert list(models) == ["parent", "assembled"]
    assert list(models["parent"]) == ["accuracy", "stderr"]
    assert list(models["assembled"]) == [
        *("accuracy", "stderr", "difference", "difference_stderr", "accuracy_preserved", "accuracy_preserved_stderr")
    ]


def test_the_standard_error_of_what_is_preserved_is_the_jackknifes() -> None:
    """Leave one question out, in 200 of them: the linearised error must agree to 2 % (both err by about 1/n)."""
    right = [float(i % 3 != 0) for i in range(200)]
    child = [float((i % 3 != 0 and i % 7 != 0) or i % 12 == 0) for i in range(200)]
    comparison = compare({"parent": answers(tuple(right)), "assembled": answers(tuple(child))})
    ratios = [(sum(child) - mine) / (sum(right) - theirs) for mine, theirs in zip(child, right, strict=True)]
    jackknife = math.sqrt(199 / 200 * sum((ratio - statistics.fmean(ratios)) ** 2 for ratio in ratios))
    assert comparison.children["assembled"].accuracy_preserved_stderr == pytest.approx(jackknife, rel=0.02)


def test_an_equal_child_keeps_everything() -> None:
    child = compare({"parent": answers(RIGHT), "assembled": answers(RIGHT)}).children["assembled"]
    assert (child.difference, child.difference_stderr) == (0, 0)
    assert (child.accuracy_preserved, child.accuracy_preserved_stderr) == (1, 0)


@pytest.mark.parametrize(("correct", "at_chance"), [(25, True), (33, True), (34, False)])
def test_a_parent_within_two_standard_errors_of_a_guesser_is_at_chance(correct: int, at_chance: bool) -> None:
    """100 questions of 4 choices: a guesser has 25 ± 4.33 right."""
    right = (1.0,) * correct + (0.0,) * (100 - correct)
    comparison = compare({"parent": answers(right), "assembled": answers(right)})
    assert comparison.parent_at_chance is at_chance
    assert (comparison.children["assembled"].accuracy_preserved is None) is at_chance


def test_two_right_answers_of_two_do_not_beat_a_guesser() -> None:
    """Their own standard error is 0, the guesser's is not."""
    assert compare({"parent": answers((1.0, 1.0), choices=2)}).parent_at_chance


def test_chance_is_the_mean_over_questions_with_different_choices() -> None:
    assert compare({"parent": Answers(("a", "b"), (1.0, 0.0), (0.5, 0.25))}).chance == 0.375


def test_models_that_were_asked_something_else_are_not_compared() -> None:
    with pytest.raises(AssertionError, match="different questions"):
        compare({"parent": answers(RIGHT), "assembled": answers(WORSE, prompt="other")})


def test_the_table_fits_and_marks_a_parent_at_chance() -> None:
    answered = compare({"parent": answers(RIGHT), "assembled": answers(WORSE)})
    guessed = compare({"parent": answers(WORSE[5:]), "assembled": answers(RIGHT[5:])})
    tasks = [TaskAccuracy("a" * 30, "acc_norm", answered), TaskAccuracy("guessed", "acc", guessed)]
    table = accuracy_table("like-51b", tasks, "lm-eval 0.4.13, float32")
    assert all(len(line) <= 100 for line in table.splitlines())
    assert table.count("at chance: nothing to preserve") == 1
    assert "87.5 ± 12.5" in table
    assert "-12.5 ± 22.7" in table
    assert "85.7 ± 24.5" in table
