"""What the figures of runs are made of: axes with units, labels beside lines, shaded stages, bars, maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpifedlora.core.curves import Span
from mpifedlora.io.figures import COLORS, Draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY_POINTS = 40  # from here on bars become areas, and lines lose their markers
HALF = (5.4, 3.4)  # inches: half the width of a page
INK, SHADE = "#000000", "#7F7F7F"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class RunFigure(NamedTuple):
    """One figure of a run.

    Args:
        name: of its files.
        title: above it on the page.
        text: what it shows, for who does not see it.
        draw: draws it.
        size: inches.
    """

    name: str
    title: str
    text: str
    draw: Draw
    size: tuple[float, float] = HALF


def byte_unit(largest: float) -> tuple[float, str]:
    """Return the unit that a scale of bytes is written in, as its size and its name.

    >>> byte_unit(21.5e6)
    (1000000.0, 'MB')
    """
    return next((unit for unit in _UNITS if largest >= unit[0]), (1.0, "B"))


def draw_curve(axes: Axes, x: Any, y: Any, color: str, **options: Any) -> None:
    """Draw a line with a marker at each point; of many points, without markers."""
    marks: dict[str, Any] = {} if len(x) <= MANY_POINTS else {"marker": "None"}
    axes.plot(x, y, color=color, clip_on=False, **marks, **options)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names beside the ends of lines, on the right edge, none upon another.

    Args:
        axes: whose limits are set, on a linear scale.
        ends: height of each, in data units, its name and its colour.
    """
    low, high = axes.get_ylim()
    shares = [(height - low) / (high - low) for height, _, _ in ends]
    for place, (_, name, color) in zip(_spread_out(shares, 0.075), ends, strict=True):
        axes.text(1.015, place, name, transform=axes.transAxes, color=color, va="center", fontsize="small")


def _spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Move places apart, from the lowest up, and back down from the top."""
    order = np.argsort(places, kind="stable")
    moved = np.array(places, np.float64)[order]
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + gap)
    moved -= max(0.0, moved.max(initial=0.0) - 1.0)
    result = np.empty(len(moved))
    result[order] = moved
    return [float(place) for place in result]


def round_axis(axes: Axes, round_nums: Any, *, is_named: bool = True) -> None:
    """Make the x axis one of rounds: whole numbers, from half a round before to half a round after."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlim(round_nums[0] - 0.5, round_nums[-1] + 0.5)
    if is_named:
        axes.set_xlabel("round")


def byte_axis(axes: Axes, largest: float) -> float:
    """Make the x axis one of bytes sent, and return the unit to divide by."""
    size, name = byte_unit(largest)
    axes.set_xlabel(f"sent so far, up and down ({name})")
    axes.set_xlim(0, largest / size * 1.02)
    return size


def rank_axis(axes: Axes, largest: float) -> None:
    """Make the y axis one of mean LoRA ranks, from 0."""
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_ylim(0, largest * 1.1)
    axes.set_ylabel("mean LoRA rank")


def share_axis(axes: Axes, values: Any, name: str) -> None:
    """Make the y axis one of shares, from 0; a little air above the highest."""
    highest = float(np.max(values)) if len(values) else 0.0
    axes.set_ylim(0, min(1.0, highest * 1.12 + 0.01) if highest <= 1 else highest * 1.12)
    axes.set_ylabel(name)


def shade_stages(axes: Axes, spans: Sequence[Span], *, is_named: bool = True) -> None:
    """Shade every other stage and write each one's name above it."""
    for index, span in enumerate(spans):
        left, right = span.first - 0.5, span.last + 0.5
        if span.stage == "initiating":
            axes.axvspan(left, right, color=SHADE, alpha=0.16, linewidth=0, zorder=0)
        if is_named:
            whole = axes.get_xlim()[1] - axes.get_xlim()[0]
            is_narrow = (right - left) / whole < 0.2
            place, side = (
                ((left, "left") if index == 0 else (right, "right")) if is_narrow else (None, "center")
            )
            x = (left + right) / 2 if place is None else place
            axes.text(
                x,
                1.02,
                span.stage,
                transform=axes.get_xaxis_transform(),
                ha=side,
                fontsize="small",
                color=SHADE,
            )


def draw_stack(axes: Axes, round_nums: Any, parts: Mapping[str, Any]) -> None:
    """Stack parts by round: bars, or areas where there are many rounds; their names stand above."""
    floor = np.zeros(len(round_nums))
    for (name, heights), color in zip(parts.items(), COLORS, strict=False):
        top = floor + heights
        if len(round_nums) <= MANY_POINTS:
            axes.bar(round_nums, heights, bottom=floor, color=color, label=name, width=0.8, linewidth=0)
        else:
            axes.fill_between(round_nums, floor, top, color=color, label=name, linewidth=0, step="mid")
        floor = top
    axes.set_ylim(0, max(float(floor.max()) * 1.06, 1e-9))
    axes.grid(visible=False, axis="x")


def legend_above(axes: Axes, columns: int) -> None:
    """Put the legend above the axes, in one or more lines: areas and bars, then lines and points."""
    from matplotlib.collections import PathCollection
    from matplotlib.lines import Line2D

    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda place: isinstance(handles[place], Line2D | PathCollection))
    axes.legend(
        [handles[place] for place in order],
        [names[place] for place in order],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        fontsize="small",
        borderaxespad=0.2,
        handlelength=1.2,
        columnspacing=1.0,
        handletextpad=0.5,
    )


def draw_map(axes: Axes, values: Any, round_nums: Any, **options: Any) -> Any:
    """Draw a table as a map of colours, its first row on top.

    Args:
        axes: to draw on.
        values: (rows, columns).
        round_nums: of the columns; None where they are numbered from 0.
        options: of matplotlib's imshow.
    """
    rows, columns = values.shape
    first, last = (0, columns - 1) if round_nums is None else (round_nums[0], round_nums[-1])
    extent = (first - 0.5, last + 0.5, rows - 0.5, -0.5)
    axes.grid(visible=False)
    return axes.imshow(values, aspect="auto", interpolation="nearest", extent=extent, **options)


def name_rows(axes: Axes, names: Sequence[str], most: int = 40) -> None:
    """Name the rows of a map; of many rows, every so many."""
    places = thinned(len(names), most)
    axes.set_yticks(list(places), [shorten(names[place], 34) for place in places], fontsize="x-small")
    axes.tick_params(axis="y", length=0)


def thinned(count: int, most: int) -> range:
    """Return every first, second, fifth, tenth, ... of some places, such that few enough are left.

    >>> list(thinned(12, 4))
    [0, 5, 10]
    """
    steps = (number * 10**power for power in range(9) for number in (1, 2, 5))
    return range(0, count, next(step for step in steps if count <= step * most))


def shorten(text: str, most: int) -> str:
    """Make a text fit into a figure: the middle of a long one is cut out, `$` is no mathematics.

    >>> shorten("encoder.layer.11.attention.query", 16)
    'encoder.…n.query'
    """
    # Control characters are no XML.
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
    return text.replace("$", r"\$")
