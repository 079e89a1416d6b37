"""How every figure of the package looks, and how it reaches the disk: matplotlib is loaded when one is drawn.

A figure is a function that draws on an empty matplotlib Figure. Colours are Okabe and Ito's, which every
common form of colour vision tells apart; lines have a marker of their own as well.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpifedlora.errors import ConfigError
from mpifedlora.io.atomic import refusal, replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[["Figure"], object]

# Its yellow is too pale for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "font.size": 12,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "svg.fonttype": "none",  # text stays text: it can be searched, and follows the page's size
    "svg.hashsalt": "mpifedlora",  # the same figure is the same file
}


def has_matplotlib() -> bool:
    """Tell whether figures can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def require_matplotlib(what: str) -> None:
    """Check that figures can be drawn.

    Args:
        what: needs them, such as "`mpifedlora report`".

    Raises:
        ConfigError: if matplotlib is missing.
    """
    if not has_matplotlib():
        raise ConfigError(
            f"{what} must find matplotlib to draw figures, got none; pip install 'mpifedlora[plot]'"
        )


@contextmanager
def style(extra: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Draw in the package's style inside this block.

    Args:
        extra: matplotlib settings that win over it.
    """
    import matplotlib
    from matplotlib.rcsetup import cycler

    cycle = cycler(color=COLORS, marker=list(MARKERS))
    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycle, **(extra or {})}):
        yield


def render(
    draw: Draw, size: tuple[float, float], formats: tuple[str, ...], extra: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Draw a figure and return its file in each format.

    Args:
        draw: draws on an empty matplotlib Figure, for instance with `axes = figure.subplots()`.
        size: width and height, inches.
        formats: of `png` and `svg`.
        extra: matplotlib settings that win over the style.
    """
    from matplotlib.figure import Figure

    files = {}
    with style(extra), warnings.catch_warnings():
        # Names in scripts that its font lacks: the SVG has their text, the PNG boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        for kind in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
            files[kind] = buffer.getvalue()
            figure.set_layout_engine("none")  # it has been laid out: the next format is the same
    return files


def write_figure(path: Path, draw: Draw, size: tuple[float, float] = (9, 5)) -> None:
    """Draw a figure into a file, whose ending is its format.

    Args:
        path: of the file, .png or .svg; its folder is made where it is missing.
        draw: draws on an empty matplotlib Figure.
        size: width and height, inches.

    Raises:
        ConfigError: if matplotlib is missing.
        CheckpointError: if the disk refuses.
    """
    require_matplotlib(f"drawing {path.name}")
    kind = path.suffix.removeprefix(".")
    write_file(path, render(draw, size, (kind,))[kind])


def write_file(path: Path, content: bytes) -> None:
    """Put a file in place whole, and make its folder where it is missing.

    Raises:
        CheckpointError: if the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        todo = "choose another folder, or free space"
        raise refusal(f"{path.name} must be writable", error, path, todo) from error
