"""The report of a run: one page that needs nothing else, and each figure as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mpifedlora.io.figures import Draw, render, require_matplotlib, write_file
from mpifedlora.io.output_folder import REPORT_FOLDER
from mpifedlora.io.report_page import Drawn, page
from mpifedlora.io.results import Results, read_results
from mpifedlora.io.run_figures import OVERVIEW_SIZE, draw_overview, run_figures

PAGE_FILE, FIGURES_FOLDER = "report.html", "figures"
FORMATS = ("png", "svg")


class Report(NamedTuple):
    """What a report consists of.

    Args:
        page: the HTML file.
        figures: the PNG and SVG files.
        results: that it shows.
    """

    page: Path
    figures: list[Path]
    results: Results


def write_report(folder: Path, out: Path | None = None) -> Report:
    """Write the report of a run, also of one that has not ended.

    Args:
        folder: of the run.
        out: folder for the report; by default `report` in the run's.

    Raises:
        CheckpointError: if there are no results, or the disk refuses.
        ConfigError: if matplotlib is missing.
    """
    require_matplotlib("`mpifedlora report`")
    results = read_results(folder)
    out = out or (folder if folder.is_dir() else folder.parent) / REPORT_FOLDER
    files, drawn = [], []
    for figure in run_figures(results):
        written, svg = draw_files(out / FIGURES_FOLDER / figure.name, figure.draw, figure.size)
        files += written
        drawn.append(Drawn(figure, svg))
    if drawn:
        files += draw_files(out / FIGURES_FOLDER / "overview", draw_overview(results), OVERVIEW_SIZE)[0]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    write_file(out / PAGE_FILE, page(results, drawn, style).encode("utf-8", "replace"))
    return Report(out / PAGE_FILE, files, results)


def draw_files(stem: Path, draw: Draw, size: tuple[float, float]) -> tuple[list[Path], str]:
    """Draw a figure into a PNG and an SVG file, and return their paths and the SVG's text.

    Args:
        stem: path without ending.
        draw: draws the figure.
        size: inches.
    """
    contents = render(draw, size, FORMATS)
    paths = []
    for kind, content in contents.items():
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        write_file(paths[-1], content)
    return paths, contents["svg"].decode("utf-8")
