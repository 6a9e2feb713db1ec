"""Small problems of the search, every cover of them, and checks that need no solver."""

from collections.abc import Iterator

from hypothesis import strategies as st

from storage.variants import Attention, Ffn, Replacement
from tasks.puzzle.search.problem import Choice, Limit, Problem

Small = Problem[Replacement]
eighths = st.integers(0, 80).map(lambda value: value / 8)


@st.composite
def problems(draw: st.DrawFn, num_limits: int = 2) -> Small:
    """Draw 3 or 4 blocks, 1 to 4 choices each, some spans of 2 or 3, limits that are loose, tight, or too tight.

    Scores and coefficients are eighths, so that ties and sums that meet a limit exactly are common.
    """
    num_blocks = draw(st.integers(3, 4))
    replacements = [
        Replacement(block, 1, Attention("gqa", width + 1), Ffn("no_op"))
        for block in range(num_blocks)
        for width in range(draw(st.integers(1, 4)))
    ]
    spans = [
        Replacement(first, span, Attention("no_op"), Ffn("no_op"))
        for span in (2, 3)
        for first in range(num_blocks - span + 1)
    ]
    replacements += draw(st.lists(st.sampled_from(spans), unique=True, max_size=3))
    choices = tuple(Choice(replacement, draw(eighths)) for replacement in sorted(replacements))
    limits = tuple(draw(limits_of(len(choices), f"limit {number}")) for number in range(num_limits))
    return Problem("t", num_blocks, choices, limits)


@st.composite
def limits_of(draw: st.DrawFn, num_choices: int, name: str) -> Limit:
    """Draw a limit whose coefficients are eighths."""
    coefficients = tuple(draw(eighths) for _ in range(num_choices))
    return Limit(name, name, coefficients, constant=draw(eighths), upper=draw(st.integers(1, 400)) / 8)


def covers(problem: Small, block: int = 0) -> Iterator[tuple[int, ...]]:
    """Yield every exact cover of the blocks from `block` on, as indices of choices."""
    if block == problem.num_blocks:
        yield ()
    for index, choice in enumerate(problem.choices):
        if choice.replacement.first_block == block and choice.replacement.parent_blocks.stop <= problem.num_blocks:
            for rest in covers(problem, block + choice.replacement.span):
                yield (index, *rest)


def keeps(problem: Small, cover: tuple[int, ...], without: Limit | None = None) -> bool:
    """Tell whether a cover keeps all limits but one; eighths add up exactly, so no tolerance is needed."""
    return all(
        limit.constant + sum(limit.coefficients[index] for index in cover) <= limit.upper
        for limit in problem.limits
        if limit is not without
    )


def brute_force(problem: Small) -> float | None:
    """Return the smallest sum of scores over covers that keep every limit."""
    scores = [
        sum(problem.choices[index].score for index in cover) for cover in covers(problem) if keeps(problem, cover)
    ]
    return min(scores, default=None)
