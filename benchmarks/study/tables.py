"""Make the study's tables and figures from its committed results.

    python benchmarks/study/tables.py

Every table in docs/study.md and README.md that stands between `<!-- study: NAME -->` and `<!-- end -->` is
written anew, and the figures in docs/figures. With --check nothing is written, and the exit code is 1 if a
table differs from the results.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np
import scale
from design import (
    ABLATIONS,
    ARMS,
    COMMON,
    CORE,
    FACTORS,
    FIRST,
    LOCAL,
    LONGER,
    LONGER_ARMS,
    SEARCH,
    SEEDS,
    SETTINGS,
    SMALL,
    SMALL_SETTINGS,
    TRIED,
    TUNED,
    TUNING_SETTINGS,
    Arm,
    Trial,
    arms_of,
    client_setting,
    tuning,
)
from records import RESULTS, Point, Record, Records, chosen_rates
from scale_costs import read_rows

from mpifedlora.io.figures import COLORS, MARKERS, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "docs/study.md", ROOT / "README.md")
FIGURES = ROOT / "docs/figures"
BLOCK = re.compile(r"(<!-- study: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TARGET_SHARE = 0.95
RANK_16 = "fedit-r16"  # whose values do not depend on what a run is measured on
TITLES = {
    "20newsgroups": "20 Newsgroups", "r52": "Reuters R52", "mnist": "MNIST", "instructions": "Instructions",
    **{client_setting(name, 0): f"a client of {name}" for name in TUNED},
}  # fmt: skip


class Cell(NamedTuple):
    """An arm's runs in a setting on one part of the data, by seed."""

    arm: Arm
    runs: dict[int, Record]
    curves: dict[int, list[Point]]

    def mean(self, name: str) -> float:
        """Return the mean over seeds of a number of the runs."""
        return float(np.mean([getattr(run, name) for run in self.runs.values()]))


def cells(records: Records, setting: str, arms: Iterable[Arm], split: str) -> list[Cell]:
    """Return what there is of some arms at the learning rates that were chosen."""
    rates, found = chosen_rates(records), []
    for arm in arms:
        trials = [Trial(setting, arm.name, rates[setting, arm.name], seed, split) for seed in SEEDS]
        there = {trial.seed: trial for trial in trials if trial in records.runs}
        if there:
            runs = {seed: records.runs[trial] for seed, trial in there.items()}
            found.append(Cell(arm, runs, {seed: records.curves[trial] for seed, trial in there.items()}))
    return found


def local_table(records: Records) -> list[str]:
    """Return what the clients of one federation reach each alone, on the whole test part."""
    rows = []
    for setting in TUNED:
        for arm in LOCAL:
            alone = [client_setting(setting, k) for k in range(COMMON["federation.num_clients"])]
            runs = [
                run
                for run in records.runs.values()
                if run.setting in alone and (run.arm, run.split) == (arm.name, "test")
            ]
            if runs:
                values = [run.accuracy for run in runs]
                spread = f"{min(values):.3f} to {max(values):.3f}"
                rows.append((TITLES[setting], arm.about, f"{np.mean(values):.3f}", spread, f"{len(runs)}"))
    return _table(
        ("data", "training", "mean accuracy of the clients", "from the least to the best", "clients"), rows
    )


def methods_table(records: Records, setting: str) -> list[str]:
    """Return accuracy and bytes of every arm on the test part."""
    found = cells(records, setting, SMALL if setting in SMALL_SETTINGS else CORE, "test")
    reference = next((cell for cell in found if cell.arm.name.endswith("fedavg")), None)
    fixed = next((run for run in records.runs.values() if (run.setting, run.arm) == (setting, RANK_16)), None)
    head = ("method", "learning rate", "accuracy", "best", "minus FedAvg, by seed", "MB up / down",
            "values sent", "fewer", "fewer bytes", "times fixed rank 16", "MB to 95 % of its best",
            "rounds", "CPU s", "seeds")  # fmt: skip
    rows = []
    for cell in found:
        run = next(iter(cell.runs.values()))
        reached = _reached(cell, reference)
        rows.append((
            cell.arm.about,
            f"{run.rate:g}",
            _spread([run.accuracy for run in cell.runs.values()]),
            f"{cell.mean('best_accuracy'):.3f}",
            _difference(cell, reference),
            *(("-",) * 7 if cell.arm.name.startswith("central") else _costs(cell, reached, fixed)),
            _seconds(cell),
            f"{len(cell.runs)}",
        ))  # fmt: skip
    return _table(head, rows)


SUMMARY = ("fedavg", "fedavgm", "fedit-r8", "fedit-r8-momentum", "fedit-r2", "sa-published", "sa-late-full",
           "sa-adapter", "sa-rated", "sa-late")  # fmt: skip


def summary_table(records: Records) -> list[str]:
    """Return accuracy and bytes of the main arms on both data sets, for the README."""
    found = {name: cells(records, name, [ARMS[arm] for arm in SUMMARY], "test") for name in TUNED}
    rows = []
    for arm in SUMMARY:
        here = {name: cell for name in TUNED for cell in found[name] if cell.arm.name == arm}
        if here:
            sent = next(iter(here.values()))
            accuracies = [_with_seeds(here[name]) if name in here else "-" for name in TUNED]
            megabytes = f"{sent.mean('sent_bytes') / 1e6:,.0f} MB"
            rows.append((ARMS[arm].about, *accuracies, megabytes, _fewer(sent, "bytes")))
    return _table(("method", *(TITLES[name] for name in TUNED), "sent", "less than FedAvg"), rows)


def _with_seeds(cell: Cell) -> str:
    runs = cell.runs.values()
    return f"{_spread([run.accuracy for run in runs])} ({', '.join(f'{run.accuracy:.3f}' for run in runs)})"


def _costs(cell: Cell, reached: tuple[float, float] | None, fixed: Record | None) -> tuple[str, ...]:
    return (
        f"{cell.mean('uplink_bytes') / 1e6:,.0f} / {cell.mean('downlink_bytes') / 1e6:,.0f}",
        f"{cell.mean('sent_values') / 1e6:,.0f} M",
        _fewer(cell, "values"),
        _fewer(cell, "bytes"),
        f"{cell.mean('sent_values') / fixed.sent_values:.2f}" if fixed else "-",
        f"{reached[0] / 1e6:,.0f}" if reached else "-",
        f"{reached[1]:.0f}" if reached else "-",
    )


def search_table(records: Records) -> list[str]:
    """Return what was tried to find the step sizes, on the validation part."""
    found = cells(records, FIRST, SEARCH, "validation")
    rows = [(cell.arm.about, f"{cell.mean('loss'):.3f}", f"{cell.mean('accuracy'):.3f}") for cell in found]
    return _table(("step sizes, rank 16 to 2", "loss", "accuracy"), rows)


def tried_table(records: Records) -> list[str]:
    """Return what was tried to find the server's step and the schedule, on the validation part."""
    rows = [
        (
            cell.arm.about,
            f"{cell.arm.rates[0]:g}",
            f"{cell.mean('loss'):.3f}",
            f"{cell.mean('accuracy'):.3f}",
            _fewer(cell, "values"),
        )
        for cell in cells(records, FIRST, TRIED, "validation")
    ]
    return _table(("tried", "learning rate", "loss", "accuracy", "fewer values"), rows)


def tuning_table(records: Records) -> list[str]:
    """Return loss and accuracy on the validation part of every learning rate that was tried."""
    rows = []
    for setting in TUNING_SETTINGS:
        for arm in arms_of(setting):
            runs = [
                records.runs[t]
                for t in tuning()
                if (t.setting, t.arm) == (setting, arm.name) and t in records.runs
            ]
            best = min((run.loss for run in runs), default=0.0)
            tried = (
                f"{run.rate:g}: {_bold(f'{run.loss:.3f}', run.loss == best)} ({run.accuracy:.3f})"
                for run in runs
            )
            if runs:
                rows.append((TITLES[setting], arm.about, ", ".join(tried)))
    return _table(("data", "method", "learning rate: loss (accuracy)"), rows)


def ablation_table(records: Records) -> list[str]:
    """Return what each change of one factor does, on the validation part."""
    found = cells(records, FIRST, (ARMS["sa-adapter"], *ABLATIONS), "validation")
    reference = next((cell for cell in found if cell.arm.name == "sa-adapter"), None)
    rows = []
    for cell in found:
        is_reference = cell is reference
        rows.append((
            "**as it is**" if is_reference else cell.arm.about,
            _spread([run.accuracy for run in cell.runs.values()]),
            "" if is_reference else _difference(cell, reference),
            f"{cell.mean('loss'):.3f}",
            _fewer(cell, "bytes"),
            f"{len(cell.runs)}",
        ))  # fmt: skip
    return _table(
        ("change", "accuracy", "difference, by seed", "loss", "fewer bytes than FedAvg", "seeds"), rows
    )


def factor_table(records: Records) -> list[str]:
    """Return FedAvg, fixed rank and SA-FedLoRA in the other settings, on the test part."""
    rows = []
    for setting, names in FACTORS.items():
        found = cells(records, setting, [ARMS[name] for name in names], "test")
        reference = next((cell for cell in found if cell.arm.name == "fedavg"), None)
        for cell in found:
            accuracy = _spread([run.accuracy for run in cell.runs.values()])
            rows.append(
                (
                    setting,
                    cell.arm.about,
                    accuracy,
                    _difference(cell, reference),
                    _fewer(cell, "bytes"),
                    f"{len(cell.runs)}",
                )
            )
    return _table(("setting", "method", "accuracy", "minus FedAvg, by seed", "fewer bytes", "seeds"), rows)


def longer_table(records: Records) -> list[str]:
    """Return what some arms reach with twice the rounds, against FedAvg with the rounds of the core."""
    rows = []
    for longer, name in LONGER.items():
        arms = [ARMS[arm] for arm in LONGER_ARMS]
        shorter = [(name, cell) for cell in cells(records, name, arms, "test")]
        reference = next((cell for _, cell in shorter if cell.arm.name == "fedavg"), None)
        both = [*shorter, *((longer, cell) for cell in cells(records, longer, arms, "test"))]
        for setting, cell in both if reference else ():
            fewer = 100 * (1 - cell.mean("sent_bytes") / reference.mean("sent_bytes"))
            rows.append((
                TITLES[name],
                cell.arm.about,
                str({**COMMON, **SETTINGS[setting]}["federation.num_rounds"]),
                _spread([run.accuracy for run in cell.runs.values()]),
                _difference(cell, reference),
                f"{cell.mean('sent_bytes') / 1e6:,.0f} MB",
                f"{fewer:.2f} %" if fewer >= 0 else "-",
                _seconds(cell),
                f"{len(cell.runs)}",
            ))  # fmt: skip
    head = ("data", "method", "rounds", "accuracy", "minus FedAvg, by seed", "sent", "fewer bytes", "CPU s",
            "seeds")  # fmt: skip
    return _table(head, rows)


def scale_section(records: Records) -> list[str]:
    """Return what large models would cost on paper, from the results of `scale.py`."""
    rows = read_rows(scale.Row, RESULTS / "scale.csv")
    svds = read_rows(scale.SvdRow, RESULTS / "scale_svd.csv")
    lines = scale.section(rows, svds, results="../benchmarks/study/results").splitlines()
    return lines[2:-1]  # without its title and its figure, which stand in the page


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _fewer(cell: Cell, unit: str) -> str:
    """Return how many fewer `bytes` or `values` were sent than by full-model FedAvg."""
    return f"{100 * (1 - cell.mean(f'sent_{unit}') / cell.mean(f'full_model_{unit}')):.2f} %"


def _difference(cell: Cell, reference: Cell | None) -> str:
    """Return the mean of paired differences in points, and each of them."""
    if reference is None or cell is reference:
        return ""
    both = [seed for seed in cell.runs if seed in reference.runs]
    points = [100 * (cell.runs[seed].accuracy - reference.runs[seed].accuracy) for seed in both]
    listed = ", ".join(f"{value:+.1f}" for value in points)
    return f"{np.mean(points):+.1f} ({listed})" if points else ""


def _reached(cell: Cell, reference: Cell | None) -> tuple[float, float] | None:
    """Return mean bytes and rounds until each seed's run is within 5 % of FedAvg's best of that seed."""
    if reference is None:
        return None
    firsts = []
    for seed, curve in cell.curves.items():
        if seed not in reference.runs:
            return None
        target = TARGET_SHARE * reference.runs[seed].best_accuracy
        first = next((point for point in curve if point.accuracy >= target), None)
        if first is None:
            return None
        firsts.append((first.sent_bytes, first.round_num))
    return tuple(np.mean(firsts, axis=0))


def _seconds(cell: Cell) -> str:
    seconds = [run.cpu_s for run in cell.runs.values() if np.isfinite(run.cpu_s)]
    return f"{np.mean(seconds):.0f}" if seconds else "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


TABLES: Mapping[str, Callable[[Records], list[str]]] = {
    **{
        f"methods-{name}": lambda records, name=name: methods_table(records, name)
        for name in (*TUNED, *SMALL_SETTINGS)
    },
    "summary": summary_table,
    "local": local_table,
    "search": search_table,
    "tried": tried_table,
    "tuning": tuning_table,
    "ablations": ablation_table,
    "factors": factor_table,
    "longer": longer_table,
    "scale": scale_section,
}


def rebuilt(text: str, records: Records) -> str:
    """Return a page with every table made anew."""
    return BLOCK.sub(lambda found: found[1] + "\n".join(TABLES[found[2]](records)) + "\n" + found[3], text)


def draw_curves(records: Records) -> Callable[[Figure], object]:
    """Return what draws accuracy against bytes, a panel for each data set."""
    names = ("fedavg", "fedit-r8", "fedit-r2", "sa-late-full", "sa-rated")

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(TUNED), squeeze=False)[0]
        for axis, setting in zip(axes, TUNED, strict=True):
            for cell in cells(records, setting, [ARMS[name] for name in names], "test"):
                i = names.index(cell.arm.name)
                points = [[(p.sent_bytes, p.accuracy) for p in curve] for curve in cell.curves.values()]
                sent, accuracy = np.mean(np.array(points), axis=0).T
                look = {"color": COLORS[i], "marker": MARKERS[i], "label": cell.arm.about.replace("`", "")}
                axis.plot(sent / 1e9, accuracy, **look)
            axis.set(
                xscale="log", title=TITLES[setting], xlabel="GB sent, both directions", ylabel="test accuracy"
            )
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)

    return draw


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; end with 1 if a page differs from the results.")
def main(check: bool) -> None:
    """Make all tables and figures, or check them."""
    records, differing = Records(), []
    for page in PAGES:
        text = page.read_text()
        fresh = rebuilt(text, records)
        if fresh != text:
            differing.append(page.name)
            if not check:
                page.write_text(fresh)
    if not check:
        write_figure(FIGURES / "study-curves.png", draw_curves(records), (12, 5))
        rows = read_rows(scale.Row, RESULTS / "scale.csv")
        write_figure(FIGURES / "study-scale.png", lambda figure: scale.draw(rows, figure), (12, 5.5))
    for name in differing:
        click.echo(f"{name}: {'differs from' if check else 'written from'} benchmarks/study/results")
    sys.exit(1 if check and differing else 0)


if __name__ == "__main__":
    main()
