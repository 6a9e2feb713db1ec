"""When a replacement has been scored enough: by hand, and never on few sequences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.puzzle.stopping import LEAST_SEQUENCES, Contender, is_dominated, is_settled

KL = st.floats(0, 5)


def test_a_small_error_settles() -> None:
    kl = [1.0, 1.2, 0.8, 1.0] * 2  # stdev 0.1512, error 0.0535 of a mean of 1
    assert is_settled(kl, 0.054)
    assert not is_settled(kl, 0.053)
    assert not is_settled([1.0] * 8, 0.0)  # 0 asks for all tokens


@given(st.lists(KL, max_size=LEAST_SEQUENCES - 1), st.floats(0, 1))
def test_few_sequences_settle_nothing(kl: list[float], relative_error: float) -> None:
    assert not is_settled(kl, relative_error)
    small = Contender(0, 0, (0.0,) * len(kl))
    assert not is_dominated(Contender(1, 1, tuple(kl)), [small])


def test_beaten_by_a_smaller_one_beyond_the_error_of_the_difference() -> None:
    """Both are noisy, their difference of 1 on every sequence is not."""
    one = Contender(100, 10, (2.0, 5.0, 3.0, 9.0) * 2)
    other = (1.0, 4.0, 2.0, 8.1) * 2
    assert is_dominated(one, [one, Contender(100, 10, other)])
    assert is_dominated(one, [Contender(90, 0, other), one])
    assert not is_dominated(one, [Contender(101, 0, other)])  # more parameters
    assert not is_dominated(one, [Contender(0, 11, other)])  # more KV
    assert not is_dominated(
        one, [Contender(90, 0, (1.0, 4.0, 2.0, 11.0) * 2)]
    )  # differences 1, 1, 1, -2: lower, but within the error


@given(st.lists(st.tuples(KL, KL), min_size=LEAST_SEQUENCES, max_size=9))
def test_of_two_of_one_size_at_most_one_is_beaten(pairs: list[tuple[float, float]]) -> None:
    one, other = (Contender(1, 1, kl) for kl in zip(*pairs, strict=True))
    assert not (is_dominated(one, [other]) and is_dominated(other, [one]))


@pytest.mark.parametrize("more", [1, 5])
def test_sequences_that_only_one_was_scored_on_do_not_count(more: int) -> None:
    one = Contender(1, 1, (2.0,) * 8 + (0.0,) * more)
    assert is_dominated(one, [Contender(1, 1, (1.0,) * 8)])
