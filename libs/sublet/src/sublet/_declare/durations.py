"""Durations as users write them: ``timedelta(seconds=90)`` or ``"1m30s"``."""

from __future__ import annotations

import re
from datetime import timedelta

Duration = timedelta | str
"""A timedelta, or a text of numbers and units such as ``"5m"``, ``"1h30m"``, ``"1.5s"`` (units: d h m s ms)."""

_UNIT_S = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[dhms])")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")


def seconds_of(duration: Duration, what: str = "duration") -> float:
    """The duration in seconds, with fractions. ``what`` names it in errors.

    Raises:
        ValueError: the text is not understood, or the duration is negative.
        TypeError: it is neither a timedelta nor a text.
    """
    if isinstance(duration, timedelta):
        seconds = duration.total_seconds()
    elif isinstance(duration, str):
        text = "".join(duration.split())
        if not _WHOLE.fullmatch(text):
            raise ValueError(
                f'{what} {duration!r} is not understood: write numbers with units, such as "30s", "5m" or "1h30m"'
                " (units: d, h, m, s, ms), or give a timedelta"
            )
        seconds = sum(float(number) * _UNIT_S[unit] for number, unit in _PART.findall(text))
    else:
        raise TypeError(f"{what} must be a timedelta or a text such as '5m', not {type(duration).__name__}")
    if seconds < 0:
        raise ValueError(f"{what} must not be negative: {duration}")
    return seconds


def positive_seconds_of(duration: Duration, what: str) -> float:
    """Like `seconds_of`, for durations that must be longer than zero (ValueError)."""
    seconds = seconds_of(duration, what)
    if seconds == 0:
        raise ValueError(f"{what} must be longer than zero")
    return seconds


def text_of(duration: Duration) -> str:
    """A short text for names: whole hours or minutes if possible, else seconds (``"2h"``, ``"5m"``, ``"90s"``,
    ``"0.5s"``). A text is returned unchanged."""
    if isinstance(duration, str):
        return duration
    seconds = duration.total_seconds()
    if seconds and seconds % 3_600 == 0:
        return f"{int(seconds // 3_600)}h"
    if seconds and seconds % 60 == 0:
        return f"{int(seconds // 60)}m"
    return f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"
