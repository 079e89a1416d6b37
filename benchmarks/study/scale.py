"""Put on paper what a round of Llama-7B and 70B costs, with 64 and 1,024 clients, in a cluster and far apart.

    python benchmarks/study/scale.py

Bytes are in closed form, latency is measured, links are assumed (see `scale_costs.py`); nothing is trained or
sent. It writes scale.csv, scale_svd.csv, scale.png, and scale.md, a section for the study's document.
"""

from __future__ import annotations

import itertools
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

sys.path.append(str(Path(__file__).parents[1]))

import common
from scale_costs import (
    ANNEALED,
    CLIENTS,
    FIXED_RANK,
    METHODS,
    MODELS,
    SERVER_GBIT,
    WIRES,
    Row,
    SvdRow,
    compute,
    find,
    links,
    make_config,
    read_fits,
)

from mpifedlora.core.units import human_bytes, human_time
from mpifedlora.io.compare import write_csv
from mpifedlora.io.figures import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
LINKS = CLUSTER, FEDERATION = [link.name for link in links()]


def table(rows: Iterable[Row]) -> str:
    """Return a Markdown table of the mean round under `gather`; cells have both wires.

    Args:
        rows: of scale.csv.
    """
    gathered = [row for row in rows if row.collect == "gather"]
    titles = ["model", "clients", "method", "a client's bytes", "100 Gbit/s link", "this machine's memory"]
    lines = [_line([*titles, "100 Mbit/s links"]), "|---" * 7 + "|"]
    for model, clients, method in itertools.product(MODELS, CLIENTS, METHODS):
        place = {"model": model, "clients": clients, "method": method}
        near, far = ([find(gathered, **place, link=link, wire=wire) for wire in WIRES] for link in LINKS)
        cells = (
            [human_bytes(row.up_bytes + row.down_bytes) for row in near],
            [duration(row.link_s) for row in near],
            [duration(row.memory_s) for row in near],
            [duration(row.link_s) for row in far],
        )
        lines.append(_line([model, f"{clients:,}", method, *map(" / ".join, cells)]))
    return "\n".join(lines)


def svd_table(svds: Iterable[SvdRow]) -> str:
    """Return a Markdown table of the server's SVDs in a round; a star marks what is scaled, not timed.

    Args:
        svds: of scale_svd.csv.
    """
    names = (f"rank {FIXED_RANK}", "annealed", "last")
    titles = [f"{clients:,} clients: {name}" for clients in CLIENTS for name in names]
    lines = [_line(["CPU time, one thread", *titles]), "|---" * (1 + len(titles)) + "|"]
    for model in MODELS:
        cells = [cell for row in svds if row.model == model for cell in _svd_cells(row)]
        lines.append(_line([model, *cells]))
    return "\n".join(lines)


def _svd_cells(row: SvdRow) -> list[str]:
    star = "" if row.last_is_measured else "*"
    return [f"{duration(row.fixed_s)}*", f"{duration(row.mean_s)}*", duration(row.last_s) + star]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def duration(seconds: float) -> str:
    """Write a duration: seconds with two digits, or its two largest units.

    >>> duration(0.1234), duration(12.6), duration(7500)
    ('0.12 s', '13 s', '2h05m')
    """
    return human_time(seconds) if seconds >= 59.5 else f"{seconds:.2g} s"


def section(
    rows: Sequence[Row],
    svds: Sequence[SvdRow],
    server_gbit: float = SERVER_GBIT,
    results: str = "results",
) -> str:
    """Return the section of the study's document, Markdown.

    Args:
        rows: of scale.csv.
        svds: of scale_svd.csv.
        server_gbit: that the rows were computed with.
        results: where links find the folder of these files.
    """
    title = "## Scale on paper"
    grounds, findings = _bullets(_grounds(server_gbit, results)), _bullets(_findings(rows, svds))
    figure = f"![Seconds of a round]({results}/scale.png)"
    return "\n\n".join((title, grounds, table(rows), findings, svd_table(svds), figure)) + "\n"


def _grounds(server_gbit: float, results: str) -> Iterator[str]:
    """Say what is closed form, measured, assumed and left out."""
    num_rounds, fit = make_config(ANNEALED, WIRES[0]).federation.num_rounds, read_fits()["gather"]
    yield (
        "Nothing of this size was run: `python benchmarks/study/scale.py` computes all numbers "
        f"([CSV]({results}/scale.csv)). Mean round of {num_rounds}, all clients; cells: 4- / 2-byte wire. "
        "**Left out**: training, evaluation, rounding; SVDs stand below."
    )
    yield (
        "**Closed form**: a client's bytes, up + down, headers too, by the package's own forecast on the "
        "shapes of Llama 2 (70B: 8 key-value heads), every linear layer adapted. Annealed: `sa-fedlora` at "
        f"its defaults; rank {FIXED_RANK}: `fedit`."
    )
    yield (
        f"**Measured**: {1e3 * fit.latency_s:.1f} ms of latency a worker, and in the column \"this machine's "
        f'memory" {1e-3 / fit.s_per_megabyte:.1f} GB/s: `bench_scaling.py`, 1 to 8 workers on '
        f"{_machine('bench_scaling')}, extrapolated far beyond them."
    )
    yield (
        "**Assumed**: the links. At 100 Gbit/s each node has one, and messages go down a binary tree; at 100 "
        f"Mbit/s each client has one, and the server {server_gbit:g} Gbit/s for all. First down, then up; no "
        "network's latency."
    )


def _findings(rows: Sequence[Row], svds: Sequence[SvdRow]) -> Iterator[str]:
    """Say in words what the numbers show, for annealing and against it."""
    wide = [row for row in rows if row.wire == WIRES[0]]
    (small, large), (few, many), fixed_name = MODELS, CLIENTS, f"rank {FIXED_RANK}"
    far = [row for row in wide if row.model == small and row.link == FEDERATION]
    full, fixed, annealed = (find(far, clients=few, method=method) for method in METHODS)
    mean, last = (one(annealed) / one(fixed) for one in (_sent, _last_sent))
    fewer = 100 * (1 - _sent(annealed) / _sent(full))
    yield (
        f"**Bytes**: annealed sends {mean:.2f} times those of {fixed_name}, {last:.2f} times in its last "
        f"round; {fewer:.1f} % fewer than FedAvg."
    )
    at_few, at_many = (
        [duration(find(far, clients=clients, method=method).link_s) for method in METHODS]
        for clients in CLIENTS
    )
    yield (
        f"**At 100 Mbit/s** they are the time: a round of {small} with {few} clients takes FedAvg "
        f"{at_few[0]}, {fixed_name} {at_few[1]}, annealed {at_few[2]}; with {many:,}, which share the "
        f"server's link, {', '.join(at_many)}."
    )
    near = [row for row in wide if (row.model, row.link, row.clients) == (large, CLUSTER, many)]
    summed = [duration(find(near, method=method, collect="reduce").link_s) for method in METHODS]
    yield (
        '**At 100 Gbit/s** means may be added up on the way (`collect = "reduce"`, 4-byte only): '
        f"{large} with {many:,} clients in {summed[0]} (FedAvg), {summed[1]} ({fixed_name}), {summed[2]} "
        "(annealed). Exact sums (`product`) need all updates at the server: "
        f"{duration(find(near, method=ANNEALED, collect='gather').link_s)}."
    )
    yield (
        f"**SVDs of exact sums** ({fixed_name}; annealed, mean round; its last, rank {svds[0].last_rank}) "
        "take longer still; means, the default, have a cut's only. `bench_aggregation.py` on "
        f"{_machine('bench_aggregation')}; *: scaled from its sizes. Cores share them."
    )


def _bullets(texts: Iterable[str]) -> str:
    wrap = textwrap.TextWrapper(130, "- ", "  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap.fill, texts))


def _machine(name: str) -> str:
    environment = json.loads((common.RESULTS / f"{name}.json").read_text())["environment"]
    return f"{environment['num_cores']} cores ({environment['cpu'].replace('(R)', '')})"


def _sent(row: Row) -> int:
    return row.up_bytes + row.down_bytes


def _last_sent(row: Row) -> int:
    return row.last_up_bytes + row.last_down_bytes


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Draw the seconds of mean rounds by link; crosses where the workers add up."""
    panels = figure.subplots(1, 2, sharey=True)
    for link, axes in zip(LINKS, panels, strict=True):
        _draw_link([row for row in rows if row.link == link], axes)
    panels[0].set(yscale="log", ylabel="seconds of a round, without training", title=f"cluster, {CLUSTER}")
    panels[1].set(title=f"federation, {FEDERATION} a client")
    low, high = panels[1].get_ylim()
    panels[1].set_ylim(low, 30 * high)  # room for the legend
    panels[0].legend(loc="upper left", fontsize=10, ncols=2)


def _draw_link(rows: Sequence[Row], axes: Axes) -> None:
    groups = list(itertools.product(MODELS, CLIENTS))
    for method, color, marker, shift in zip(METHODS, common.COLORS, "osv", (-0.2, 0, 0.2), strict=False):
        for wire, collect in ((WIRES[0], "gather"), (WIRES[1], "gather"), (WIRES[0], "reduce")):
            kind = {"method": method, "wire": wire, "collect": collect}
            chosen = [row for row in rows if kind.items() <= row._asdict().items()]
            if chosen:
                seconds = [find(chosen, model=model, clients=clients).link_s for model, clients in groups]
                label = f"{method}, {'4' if wire == WIRES[0] else '2'}-byte"
                fill = color if wire == WIRES[0] else "white"
                is_summed = collect == "reduce"
                x = [place + shift for place in range(len(groups))]
                (line,) = axes.plot(x, seconds, color=color, ls="", mfc=fill)
                line.set(marker="x" if is_summed else marker, label=label + ", added up" * is_summed)
    axes.set_xticks(range(len(groups)), [f"{model}\n{clients:,} clients" for model, clients in groups])
    axes.tick_params(axis="x", labelsize=10)


@click.command()
@click.option(
    "--server-gbit",
    default=SERVER_GBIT,
    show_default=True,
    help="Assumed link of the federation's server, Gbit/s.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for all that is written; by default scale.md goes beside this script, the rest to results/.",
)
def main(server_gbit: float, out: Path | None) -> None:
    """Compute what a round of Llama-7B and 70B costs: some seconds, nothing is trained or sent."""
    rows, svds = compute(server_gbit)
    results, text = out or FOLDER / "results", section(rows, svds, server_gbit)
    write_csv(results / "scale.csv", [row._asdict() for row in rows])
    write_csv(results / "scale_svd.csv", [row._asdict() for row in svds])
    write_file((out or FOLDER) / "scale.md", text.encode())
    common.draw(results / "scale.png", lambda figure: draw(rows, figure), (12, 5.5))
    print(text, end="")


if __name__ == "__main__":
    main()
