"""Seconds in, a duration as people write it out."""


def duration_text(seconds: float) -> str:
    """Return a duration in the largest unit that suits it: `40 s`, `12 min`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
