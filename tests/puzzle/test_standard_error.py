"""The clustered standard error: known answers, and what repeated draws say."""

import math
import random
import statistics

import pytest

from tasks.puzzle.standard_error import standard_error


def test_with_a_document_to_each_sequence_it_is_the_textbook_one() -> None:
    values = [0.3, 0.1, 0.7, 0.2, 0.9]
    assert standard_error(values, range(5)) == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_documents_of_unequal_size_count_with_the_sum_of_their_deviations() -> None:
    """By hand: mean 3, sums of deviations -2 - 1 = -3 and 0 and 3, so sqrt(3 / 2 * (9 + 0 + 9)) / 4."""
    assert standard_error([1, 2, 3, 6], [7, 7, 4, 9]) == pytest.approx(math.sqrt(27) / 4)
    assert standard_error([3, 1, 6, 2], [4, 7, 9, 7]) == pytest.approx(math.sqrt(27) / 4), "whatever the order"


def test_a_sequence_that_is_there_twice_says_no_more() -> None:
    """As two sequences of a document, or as one with twice the weight."""
    once = standard_error([0.7, 0.1, 0.9], [0, 1, 2])
    assert standard_error([0.7, 0.1, 0.9] * 2, [0, 1, 2] * 2) == pytest.approx(once)
    twice = standard_error([0.7, 0.7, 0.1, 0.9], [0, 0, 1, 2])
    assert standard_error([0.7, 0.1, 0.9], [0, 1, 2], weights=[2, 1, 1]) == pytest.approx(twice)


@pytest.mark.parametrize("num_sequences", [1, 5])
def test_one_document_has_no_error(num_sequences: int) -> None:
    assert standard_error([0.1 * index for index in range(num_sequences)], [3] * num_sequences) is None


def test_over_repeated_draws_it_is_right_where_the_plain_one_is_too_small() -> None:
    """Texts of 1 to 4 sequences, half of whose variance is the document's: 24 documents, 1,500 draws.

    The mean of the estimated variances has an error of about 1 %; CR1 itself lacks a few per cent where sizes differ.
    """
    chance = random.Random(0)
    documents = [document for document in range(24) for _ in range(1 + document % 4)]
    means, clustered, plain = [], [], []
    for _ in range(1500):
        levels = [chance.gauss(0, 1) for _ in range(24)]
        draw = [levels[document] + chance.gauss(0, 1) for document in documents]
        means.append(statistics.fmean(draw))
        clustered.append((standard_error(draw, documents) or 0.0) ** 2)
        plain.append((standard_error(draw, range(len(draw))) or 0.0) ** 2)
    true_variance = statistics.variance(means)
    assert statistics.fmean(clustered) == pytest.approx(true_variance, rel=0.1)
    assert statistics.fmean(plain) < 0.6 * true_variance
