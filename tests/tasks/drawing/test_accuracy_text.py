"""The table of accuracy preserved, on the terminal and on the page."""

from storage.accuracy import RATING, Accuracy, ChildLoss, PositionBucket
from tasks.drawing.accuracy_tables import accuracy_table, positions_table
from tasks.drawing.accuracy_text import accuracy_text
from tasks.puzzle.quality.accuracy import Answers, Benchmark, compare

RIGHT = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
WORSE = (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0)
WRONG = (0.0,) * 8
GUESSED = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def answers(parent: tuple[float, ...], child: tuple[float, ...], chance: float) -> dict[str, Answers]:
    return {name: Answers("x", scores, (chance,) * 8) for name, scores in (("parent", parent), ("refined", child))}


def measured() -> Accuracy:
    benchmarks = (
        compare(Benchmark("a" * 30, "acc_norm", "1", None), answers(RIGHT, WORSE, 0.25)),
        compare(Benchmark("guessed", "acc", "1", 8), answers(GUESSED, WORSE, 0.25)),
        compare(Benchmark("MT-Bench", RATING, "judge", None), answers(RIGHT, WORSE, 0.0)),
    )
    bucket = PositionBucket(4_096, 8_192, 999_999, 100, 12.345, {"refined": ChildLoss(12.595, 0.25, 0.125)})
    return Accuracy("like-51b", "float32", benchmarks, None, (bucket,))


def test_the_text_fits_and_marks_a_parent_at_chance() -> None:
    text = accuracy_text(measured())
    assert all(len(line) <= 100 for line in text.splitlines())
    assert text.count("at chance: nothing to preserve") == 1
    assert "-12.5 ± 22.7" in text and "85.7 ± 24.5" in text and "80.0 ± 33.5" in text
    assert "8.75 ± 1.25" in text, "a rating is shown out of 10"
    assert "position 4,096 to 8,191" in text and "refined +0.250 ± 0.125" in text


def test_the_page_has_the_same_numbers() -> None:
    accuracy = measured()
    preserved, guessed, rated = accuracy_table("51B-like", accuracy).rows
    assert preserved[1:7] == ("refined", "87.5 ± 12.5", "75.0 ± 16.4", "85.7 ± 24.5", "-12.5 ± 22.7", "80.0 ± 33.5")
    assert guessed[4:7] == ("at chance", "+50.0 ± 26.7", "–")
    assert rated[2:4] == ("8.75 ± 1.25", "7.50 ± 1.64")
    assert rated[4] == "85.7 ± 24.5" and rated[6] == "–", "where chance is 0 both shares are one"
    assert (preserved[7], guessed[7], rated[7]) == ("25.0", "25.0", "–")
    assert positions_table("51B-like", accuracy).rows[0][-2:] == ("12.345", "+0.250 ± 0.125")


def test_a_parent_that_writes_nothing_right_is_not_at_chance() -> None:
    """Nobody guesses what is written: both cells are dashes."""
    benchmark = compare(Benchmark("HumanEval", "pass@1", "1", None), answers(WRONG, WRONG, 0.0))
    accuracy = Accuracy("like-51b", "float32", (benchmark,), None, ())
    (row,) = accuracy_table("51B-like", accuracy).rows
    assert row[4] == "–" and row[7] == "–"
    assert "chance:" not in accuracy_text(accuracy) and "HumanEval: 8 questions, pass@1\n" in accuracy_text(accuracy)


def test_nothing_measured_is_said() -> None:
    assert "no accuracy was measured" in accuracy_text(Accuracy("small", "float32", (), None, ()))
