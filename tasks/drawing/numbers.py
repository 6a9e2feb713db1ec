"""Numbers with their errors, as tables of page and terminal show them."""


def with_error(mean: float, stderr: float | None, *, digits: int = 3, sign: str = "") -> str:
    """A mean and its standard error, to so many digits; an error that does not exist is shown as `none`, not as 0."""
    error = "none" if stderr is None else f"{stderr:.{digits}f}"
    return f"{mean:{sign}.{digits}f} ± {error}"


def counted(number: int, noun: str) -> str:
    """A number and a noun, in the plural where it needs one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
