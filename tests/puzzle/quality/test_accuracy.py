"""Accuracy against hand-counted answers: paired differences, what is preserved, a parent at chance."""

import math
import statistics

import pytest

from storage.accuracy import RATING, BenchmarkAccuracy
from tasks.puzzle.quality.accuracy import Answers, Benchmark, combine, compare

RIGHT = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
WORSE = (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0)
OWN = Benchmark("own", "acc", "1", None)


def answers(scores: tuple[float, ...], choices: int = 4, questions_digest: str = "questions") -> Answers:
    return Answers(questions_digest, scores, (1 / choices,) * len(scores))


def test_a_child_is_paired_with_its_parent() -> None:
    comparison = compare(OWN, {"parent": answers(RIGHT), "assembled": answers(WORSE)})
    parent, child = comparison.parent, comparison.children["assembled"]
    assert (comparison.questions, comparison.chance, comparison.parent_at_chance) == (8, 0.25, False)
    assert parent.mean == 7 / 8
    assert parent.stderr == pytest.approx(math.sqrt(7 / 8 * 1 / 8 / 7))
    assert child.accuracy.mean == 6 / 8
    differences = [0, 0, 0, 0, 0, -1, -1, 1]
    assert child.difference.mean == pytest.approx(-1 / 8)
    assert child.difference.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(8))
    assert child.preserved is not None and child.above_chance is not None
    assert child.preserved.mean == pytest.approx(6 / 7)
    assert child.above_chance.mean == pytest.approx((6 / 8 - 1 / 4) / (7 / 8 - 1 / 4))


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_the_standard_error_of_a_ratio_is_the_jackknifes(floor: float) -> None:
    """Leave one question out, in 200 of them: the linearised error must agree to 2 % (both err by about 1/n)."""
    right = [float(i % 3 != 0) for i in range(200)]
    child = [float((i % 3 != 0 and i % 7 != 0) or i % 12 == 0) for i in range(200)]
    measured = compare(OWN, {"parent": answers(tuple(right)), "assembled": answers(tuple(child))}).children["assembled"]
    ratios = [
        ((sum(child) - mine) / 199 - floor) / ((sum(right) - theirs) / 199 - floor)
        for mine, theirs in zip(child, right, strict=True)
    ]
    jackknife = math.sqrt(199 / 200 * sum((ratio - statistics.fmean(ratios)) ** 2 for ratio in ratios))
    ratio = measured.above_chance if floor else measured.preserved
    assert ratio is not None
    assert ratio.stderr == pytest.approx(jackknife, rel=0.02)


def test_an_equal_child_keeps_everything() -> None:
    child = compare(OWN, {"parent": answers(RIGHT), "assembled": answers(RIGHT)}).children["assembled"]
    assert child.preserved is not None and child.above_chance is not None
    assert (child.difference.mean, child.difference.stderr) == (0, 0)
    assert (child.preserved.mean, child.preserved.stderr) == (1, 0)
    assert (child.above_chance.mean, child.above_chance.stderr) == (1, 0)


@pytest.mark.parametrize(("correct", "at_chance"), [(25, True), (34, True), (35, False)])
def test_a_parent_within_two_standard_errors_of_a_guesser_is_at_chance(correct: int, at_chance: bool) -> None:
    """100 questions of 4 choices: a guesser has 25 ± 4.33 right, and 34 are known to 4.76."""
    scores = (1.0,) * correct + (0.0,) * (100 - correct)
    comparison = compare(OWN, {"parent": answers(scores), "assembled": answers(scores)})
    assert comparison.parent_at_chance is at_chance
    assert (comparison.children["assembled"].preserved is None) is at_chance


def test_two_right_answers_of_two_do_not_beat_a_guesser() -> None:
    """Their own standard error is 0, the guesser's is not."""
    assert compare(OWN, {"parent": answers((1.0, 1.0), choices=2)}).parent_at_chance


def test_where_nobody_can_guess_the_parents_own_error_counts() -> None:
    """One of 20 texts right is 5 % ± 5 %; five of 20 are 25 % ± 10 %."""
    assert compare(OWN, {"parent": Answers("texts", (1.0,) + (0.0,) * 19, (0.0,) * 20)}).parent_at_chance
    assert not compare(OWN, {"parent": Answers("texts", (1.0,) * 5 + (0.0,) * 15, (0.0,) * 20)}).parent_at_chance


def test_chance_is_the_mean_over_questions_with_different_choices() -> None:
    assert compare(OWN, {"parent": Answers("two", (1.0, 0.0), (0.5, 0.25))}).chance == 0.375


def test_models_that_were_asked_something_else_are_not_compared() -> None:
    with pytest.raises(AssertionError, match="different questions"):
        compare(OWN, {"parent": answers(RIGHT), "assembled": answers(WORSE, questions_digest="others")})


def test_the_announcements_number_is_ten_ratings_and_mmlu_over_two() -> None:
    """The 51B's: MT-Bench 8.99 and MMLU 80.2 %, the 70B's 8.93 and 81.66 %."""

    def measured(name: str, metric: str, parent: float, child: float) -> BenchmarkAccuracy:
        spread = {mean: (mean - 0.01, mean + 0.01) for mean in (parent, child)}
        by_model = {"parent": Answers("x", spread[parent], (0, 0)), "distilled": Answers("x", spread[child], (0, 0))}
        return compare(Benchmark(name, metric, "1", None), by_model)

    bench, mmlu = measured("MT-Bench", RATING, 0.893, 0.899), measured("mmlu", "acc", 0.8166, 0.802)
    combined = combine([mmlu, bench])
    assert combined is not None
    assert combined.parent.mean == pytest.approx((10 * 8.93 + 81.66) / 200)
    assert combined.children["distilled"].mean == pytest.approx((10 * 8.99 + 80.2) / 200)
    assert combined.parent.stderr == pytest.approx(math.hypot(0.01, 0.01) / 2)
    assert combine([mmlu]) is None and combine([bench]) is None
