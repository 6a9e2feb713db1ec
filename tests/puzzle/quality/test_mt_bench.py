"""MT-Bench's prompts show the judge what it has to rate, and ratings are read as the judge is told to write them."""

import pytest

from tasks.puzzle.quality.mt_bench import Question, judge_prompt, rating

OPEN = Question("writing", ("first question", "second question"), ())
MATH = Question("math", ("first question", "second question"), ("first truth", "second truth"))


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[6.5]] it is, not [[2]]", 6.5),
        ("Rating: 7", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("", None),
    ],
)
def test_the_first_rating_of_1_to_10_counts(reply: str, number: float | None) -> None:
    assert rating(reply) == number


def test_the_judge_sees_the_turns_up_to_the_rated_one() -> None:
    first, second = judge_prompt(OPEN, ["my first"]), judge_prompt(OPEN, ["my first", "my second"])
    assert "first question" in first and "my first" in first and "second question" not in first
    assert second.index("first question") < second.index("my first") < second.index("my second")
    assert "last user question" in second and "last user question" not in first
    assert "Reference" not in second


def test_the_judge_sees_right_answers_where_there_are_some() -> None:
    first = judge_prompt(MATH, ["my first"])
    assert "first truth" in first and "second truth" not in first
    assert "second truth" in judge_prompt(MATH, ["my first", "my second"])
    assert (OPEN.temperature, MATH.temperature) == (0.7, 0.0)
