"""Curves over the rounds of a run as text, for terminals of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII = " .:-=+*#@"
"""Shades for terminals whose encoding lacks `BLOCKS`."""


def columns(values: Sequence[float], num_rounds: int, width: int) -> list[float]:
    """Spread what is known of a run's rounds over the width of the whole run.

    Args:
        values: of the finished rounds; nan where a round has none.
        num_rounds: of the whole run.
        width: columns; rounds that share one are averaged.

    Returns:
        One value a column: the last known one where its rounds have none, nan where none was known or the
        rounds are still to come.

    >>> columns([4.0, 2.0, math.nan], 4, 8)
    [4.0, 4.0, 2.0, 2.0, 2.0, 2.0, nan, nan]
    """
    spread, last = [], math.nan
    for column in range(width):
        first = column * num_rounds // width
        end = max(first + 1, (column + 1) * num_rounds // width)
        known = [value for value in values[first:end] if math.isfinite(value)]
        last = sum(known) / len(known) if known else last
        spread.append(last if first < len(values) else math.nan)
    return spread


def sparkline(values: Sequence[float], num_rounds: int, width: int, shades: str = BLOCKS) -> str:
    """Draw a curve in one line; its height is in proportion to the value.

    Args:
        values: of the finished rounds, at least 0.
        num_rounds: of the whole run.
        width: characters.
        shades: nine characters, from empty to full.

    >>> sparkline([8.0, 8.0, 4.0, 1.0], 8, 8)
    '██▄▁    '
    """
    return bars(values, num_rounds, width, 1, shades=shades)[0]


def bars(
    values: Sequence[float],
    num_rounds: int,
    width: int,
    height: int,
    *,
    low: float = 0.0,
    shades: str = BLOCKS,
) -> list[str]:
    """Draw a curve in several lines, the top one first.

    Args:
        values: of the finished rounds, at least `low`.
        num_rounds: of the whole run.
        width: characters of a line.
        height: lines.
        low: value of the bottom; the top is the highest value.
        shades: nine characters, from empty to full.

    >>> bars([1.0, 2.0], 2, 4, 2)
    ['  ██', '████']
    """
    spread = columns(values, num_rounds, width)
    high = max((value for value in spread if math.isfinite(value)), default=low)
    span = high - low or 1.0
    # What is there is seen: the least value has an eighth of a line.
    eighths = [
        0 if math.isnan(value) else max(1, round(8 * height * (value - low) / span)) for value in spread
    ]
    return [
        "".join(shades[min(8, max(0, count - 8 * line))] for count in eighths)
        for line in reversed(range(height))
    ]
