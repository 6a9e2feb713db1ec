"""Numbers with their errors, as tables of page and terminal show them."""

NONE = "–"
"""A cell without a number."""


def with_error(mean: float, stderr: float | None, *, digits: int = 3, sign: str = "") -> str:
    """Format a mean and its standard error, to so many digits; an error that does not exist is `none`, not 0."""
    error = "none" if stderr is None else f"{stderr:.{digits}f}"
    return f"{mean:{sign}.{digits}f} ± {error}"


def counted(number: int, noun: str) -> str:
    """Format a number and a noun, in the plural where it needs one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
