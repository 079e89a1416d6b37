"""Several runs beside each other: read, compared, and written as CSV, LaTeX, JSON and figures."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpifedlora.core.comparison import (
    Achievement,
    Group,
    Run,
    Spread,
    choose_metric,
    comparability_notes,
    compare,
    default_target,
    front_points,
    group_by_seed,
)
from mpifedlora.core.curves import Curve, evaluated, sent_bytes
from mpifedlora.core.metrics import Metric
from mpifedlora.core.units import human_bytes, human_number, human_time
from mpifedlora.errors import ConfigError
from mpifedlora.io.figures import COLORS, MARKERS, Draw, require_matplotlib, write_file
from mpifedlora.io.panels import MANY_POINTS, SHADE, byte_unit, legend_above, shorten
from mpifedlora.io.report import draw_files
from mpifedlora.io.report_config import config_tables
from mpifedlora.io.report_page import less_or_more
from mpifedlora.io.results import Results, read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (8.6, 4.6)
_MANY_TIMES = 20  # from here on a linear axis shows nothing of the smaller ones


def head(metric: Metric) -> tuple[str, ...]:
    """Return the names of the columns of `cells`."""
    return ("run", "seeds", f"final {metric.label}", f"best {metric.label}", "sent", "vs full model",
            "sent to target", "rounds to target", "time", "efficient")  # fmt: skip


def short_head(metric: Metric) -> tuple[str, ...]:
    """Return the same for a terminal."""
    return ("run", "seeds", metric.label, "best", "sent", "vs full",
            "to target", "rounds", "time", "efficient")  # fmt: skip


class Comparison(NamedTuple):
    """Runs that were read, and what their comparison says.

    Args:
        groups: of runs that differ by seed only.
        metric: that they are compared by.
        target: its value that bytes and rounds are counted up to; nan where none was measured.
        rows: what each group has achieved.
        notes: why they are not comparable as they are; empty where they are.
    """

    groups: list[Group]
    metric: Metric
    target: float
    rows: list[Achievement]
    notes: list[str]


def read_comparison(
    folders: Sequence[Path],
    target: float | None = None,
    *,
    metric: str | None = None,
    is_less_better: bool | None = None,
) -> Comparison:
    """Read runs and compare them.

    Args:
        folders: of the runs.
        target: value of the metric; by default 5 % short of the best that a group reaches.
        metric: name of the metric; by default the accuracy, or else the first that all runs have.
        is_less_better: of it; by default as its name tells.

    Raises:
        CheckpointError: if a folder has no results.
        ConfigError: if a folder is named twice, if not all runs have the metric, or if it has no such value.
    """
    places = [folder.resolve() for folder in folders]
    twice = [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"each run must be named once, got {twice[0]} twice; leave one out")
    found = {str(folder): read_results(folder) for folder in folders}
    curves = {name: evaluated(each.rounds, each.info.metric_names) for name, each in found.items()}
    chosen = Metric.named(choose_metric(curves, metric))
    if is_less_better is not None:
        chosen = chosen._replace(is_less_better=is_less_better)
    _check_target(target, chosen)
    groups = group_by_seed([_as_run(name, each, curves[name][chosen.name]) for name, each in found.items()])
    aimed = default_target(groups, chosen) if target is None else target
    return Comparison(groups, chosen, aimed, compare(groups, aimed, chosen), comparability_notes(groups))


def _check_target(target: float | None, metric: Metric) -> None:
    if target is None or (math.isfinite(target) and (not metric.is_share or 0 <= target <= 1)):
        return
    where = "from 0 to 1" if metric.is_share else "a finite number"
    raise ConfigError(f"the target must be {where} for {metric.label}, got {target:g} (--target)")


def _as_run(name: str, results: Results, curve: Curve) -> Run:
    rounds, info = results.rounds, results.info
    sent = sent_bytes(rounds)
    return Run(
        name=name,
        method=info.method,
        config=config_tables(info),
        status=results.status,
        curve=curve,
        num_rounds=len(sent),
        total_bytes=float(sent[-1]) if len(sent) else 0.0,
        wall_s=float(np.nansum([info.startup_s, *rounds["round_s"]])),
        reduction=math.nan if results.baselines is None else results.baselines.reduction_vs_full_model,
    )


def cells(row: Achievement) -> tuple[str, ...]:
    """Return a row of the table as texts, in the order of `head`."""
    reached = row.num_reached == row.num_runs
    partly = "-" if row.num_reached == 0 else f"{row.num_reached} of {row.num_runs} runs"
    rounds = _spread(
        row.rounds_to_target, lambda value: f"{value:.1f}" if row.num_runs > 1 else f"{value:.0f}"
    )
    return (
        row.label,
        str(row.num_runs),
        _spread(row.final, human_number),
        _spread(row.best, human_number),
        human_bytes(round(row.total_bytes.mean)),
        less_or_more(row.reduction.mean),
        human_bytes(round(row.bytes_to_target.mean)) if reached else partly,
        rounds if reached else partly,
        human_time(row.wall_s.mean),
        "yes" if row.is_efficient else "",
    )


def _spread(spread: Spread, write: Callable[[float], str]) -> str:
    if math.isnan(spread.mean):
        return "-"
    return write(spread.mean) + ("" if math.isnan(spread.deviation) else f" ± {write(spread.deviation)}")


def numbers(row: Achievement, metric: Metric) -> dict[str, Any]:
    """Return a row as plain numbers: means under the fields' names, deviations beside them; nan is None.

    `final` and `best` have the metric's name behind them.
    """
    flat: dict[str, Any] = {}
    for field, value in row._asdict().items():
        name = f"{field}_{metric.name}" if field in ("final", "best") else field
        if isinstance(value, Spread):
            flat |= {name: _known(value.mean), f"{name}_sd": _known(value.deviation)}
        else:
            flat[name] = value
    return flat


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write one line a row, under a line with the names of the first row; None is an empty cell.

    Raises:
        CheckpointError: if the disk refuses.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def escape_latex(text: str) -> str:
    r"""Return a text that LaTeX sets as it is.

    >>> escape_latex("50 % of rank_max")
    '50 \\% of rank\\_max'
    """
    return "".join(_TEX.get(character, character) for character in text)


def latex_table(comparison: Comparison) -> str:
    """Return a comparison as a LaTeX table; it needs the package booktabs."""
    lines = [[escape_latex(cell) for cell in cells(row)[:-1]] for row in comparison.rows]
    body = [" & ".join(line) + r" \\" for line in lines]
    names = head(comparison.metric)[:-1]
    first = " & ".join(map(escape_latex, names)) + r" \\"
    target = f"% {target_line(comparison)}; +- is the standard deviation over seeds"
    notes = [f"% not comparable as they are: {' '.join(note.split())}" for note in comparison.notes]
    columns = "l" + "r" * (len(names) - 1)
    return "\n".join([
        *notes, target, rf"\begin{{tabular}}{{{columns}}}", r"\toprule", first, r"\midrule", *body,
        r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip


def target_line(comparison: Comparison) -> str:
    """Say which value of which metric bytes and rounds are counted up to."""
    metric = comparison.metric
    less = " (less is better)" if metric.is_less_better else ""
    return f"target {' '.join(metric.label.split())} {human_number(comparison.target)}{less}"


def write_latex(path: Path, comparison: Comparison) -> None:
    """Write a comparison as a LaTeX table.

    Raises:
        CheckpointError: if the disk refuses.
    """
    write_file(path, latex_table(comparison).encode())


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as what JSON can hold."""
    return {
        "metric": comparison.metric.name,
        "is_less_better": comparison.metric.is_less_better,
        "target": _known(comparison.target),
        "notes": comparison.notes,
        "rows": [
            {**numbers(row, comparison.metric), "runs": [run.name for run in group.runs]}
            for row, group in zip(comparison.rows, comparison.groups, strict=True)
        ],
    }


def write_figures(comparison: Comparison, out: Path) -> list[Path]:
    """Draw the metric by bytes with the Pareto front, and by round, as PNG and SVG.

    Args:
        comparison: of runs.
        out: folder for the files.

    Raises:
        ConfigError: if matplotlib is missing, or nothing was measured.
        CheckpointError: if the disk refuses.
    """
    require_matplotlib("`mpifedlora compare --out`")
    if not any(len(group.curve.values) for group in comparison.groups):
        raise ConfigError(
            f"runs must have measured their {comparison.metric.label} to be drawn, got none (no round was "
            "evaluated yet); leave --out away"
        )
    name = re.sub(r"\W+", "_", comparison.metric.name)
    draws: dict[str, Draw] = {
        f"{name}_by_bytes": lambda figure: _by_bytes(comparison, figure),
        f"{name}_by_round": lambda figure: _by_round(comparison, figure),
    }
    return [path for name, draw in draws.items() for path in draw_files(out / name, draw, SIZE)[0]]


def _by_bytes(comparison: Comparison, figure: Figure) -> None:
    axes = figure.subplots()
    curves = [group.curve for group in comparison.groups if len(group.curve.values)]
    totals = [float(curve.sent_bytes[-1]) for curve in curves]
    unit, name = byte_unit(max(totals))
    front_sent, front_values = front_points(comparison.groups, comparison.metric)
    front = np.array(front_sent) / unit
    axes.step(front, front_values, where="post", color=SHADE, alpha=0.4, linewidth=5, marker="None",
              zorder=1, label="Pareto front")  # fmt: skip
    _draw_groups(axes, comparison, [group.curve.sent_bytes / unit for group in comparison.groups])
    axes.set_xlabel(f"sent so far, up and down ({name})")
    # FedAvg sends a hundred times what the others send: on a linear axis these would be one line.
    if max(totals) > _MANY_TIMES * min(totals):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _by_round(comparison: Comparison, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    _draw_groups(axes, comparison, [group.curve.round_nums for group in comparison.groups])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel("round")


def _metric_axis(axes: Axes, metric: Metric, values: Any) -> None:
    axes.set_ylabel(f"{shorten(metric.label, 30)} (0 to 1)" if metric.is_share else shorten(metric.label, 30))
    lowest, highest = float(values.min()), float(values.max())
    if not metric.is_share and highest > _MANY_TIMES * lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    elif lowest >= 0:
        axes.set_ylim(0, min(1.0 if metric.is_share else math.inf, highest * 1.1) or 1.0)


def _draw_groups(axes: Axes, comparison: Comparison, places: Sequence[Any]) -> None:
    for index, (group, x) in enumerate(zip(comparison.groups, places, strict=True)):
        curve, color = group.curve, COLORS[index % len(COLORS)]
        if not len(curve.values):
            continue
        marker = MARKERS[index % len(MARKERS)] if len(x) <= MANY_POINTS else "None"
        axes.plot(x, curve.values, color=color, marker=marker, label=shorten(group.label, 40), clip_on=False)
        if len(group.runs) > 1:
            low, high = curve.values - group.deviation, curve.values + group.deviation
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    _metric_axis(axes, comparison.metric, np.concatenate([group.curve.values for group in comparison.groups]))
    if np.isfinite(comparison.target):
        axes.axhline(comparison.target, color=SHADE, linewidth=1, linestyle=":", marker="None")
        axes.text(0.01, comparison.target, f"target {human_number(comparison.target)}", fontsize="small",
                  color=SHADE, va="bottom", transform=axes.get_yaxis_transform())  # fmt: skip
    legend_above(axes, min(5, len(comparison.groups) + 1))
