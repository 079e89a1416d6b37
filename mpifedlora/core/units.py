"""Sizes and durations as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

RECENT_ROUNDS = 5


def human_bytes(count: int) -> str:
    """Write a number of bytes in decimal units.

    >>> human_bytes(999), human_bytes(4_123_456), human_bytes(999_950)
    ('999 B', '4.1 MB', '1.0 MB')
    """
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} PB"


def counted(count: int, noun: str) -> str:
    """Write how many of something there are.

    >>> counted(1, "worker"), counted(4, "worker")
    ('1 worker', '4 workers')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def human_number(value: float) -> str:
    """Write a number with three decimals, a large or tiny one with four digits.

    >>> human_number(0.66125), human_number(1523.2741), human_number(0.00041239), human_number(math.nan)
    ('0.661', '1523', '0.0004124', '-')
    """
    if not math.isfinite(value):
        return "-"
    is_usual = value == 0 or 0.01 <= abs(value) < 100
    return f"{value:.3f}" if is_usual else f"{value:.4g}"


def human_time(seconds: float) -> str:
    """Write a duration in its two largest units; `?` where it is not known.

    >>> human_time(7.4), human_time(80), human_time(7500), human_time(270_000), human_time(math.nan)
    ('7s', '1m20s', '2h05m', '3d03h', '?')
    """
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    for large, small, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= large:
            return f"{whole // large}{names[0]}{whole % large // small:02d}{names[1]}"
    return f"{whole}s"


def expected_s(rounds_s: Sequence[float], num_left: int) -> float:
    """Expect each round to come to take as long as the mean of the last few: rounds get shorter.

    >>> expected_s([9.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3), expected_s([], 3), expected_s([], 0)
    (3.0, nan, 0.0)
    """
    known = [seconds for seconds in rounds_s if math.isfinite(seconds)][-RECENT_ROUNDS:]
    if num_left <= 0:
        return 0.0
    return num_left * fmean(known) if known else math.nan
