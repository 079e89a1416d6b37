"""The figures of a run's clients: who has what, what they learn, what became of their updates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mpifedlora.core.curves import measured_clients
from mpifedlora.io.figures import COLORS
from mpifedlora.io.panels import (
    RunFigure,
    draw_curve,
    draw_map,
    legend_above,
    name_rows,
    round_axis,
    shorten,
    thinned,
)
from mpifedlora.io.results import Results
from mpifedlora.io.results_schema import RunInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OUTCOMES = ("used", "absent", "late", "failed", "not finite", "above bound", "not chosen")
# Of the figures' colours but for a hair, so that the page's dark style leaves them: the map is a picture.
_OUTCOME_COLORS = ("#0073B2", "#D9D9D9", "#E6A000", "#D55F00", "#7A2E00", "#CC7AA7", "#009F73")


def client_labels(info: RunInfo) -> list[str]:
    """Return what each client is called: its id, and its name where it has one."""
    if not info.client_names:
        return [str(client_id) for client_id in range(info.num_clients)]
    return [f"{client_id} {name}" for client_id, name in enumerate(info.client_names)]


def client_figures(results: Results) -> Iterator[RunFigure]:
    """Return the figures of a run's clients that have something to say."""
    info, clients = results.info, results.clients
    if info.label_table.size:
        text = f"Training examples of each of {info.num_clients} clients by label."
        height = 2.6 + 0.11 * min(36, max(10, info.num_clients))
        yield RunFigure(
            "labels", "Examples by client and label", text, partial(_labels, results), (5.4, height)
        )
    if clients["participated"].any():
        title = "Training loss across clients"
        text = "Median, quartiles and range of the clients' training losses by round."
        draw = partial(_spread, results, "train_loss", "training loss (nats)")
        yield RunFigure("client_loss", title, text, draw)
    if (found := measured_clients(clients)) is not None:
        name, values = found
        text = (
            f"Median, quartiles and range of the {name} on the clients' own examples by round; in the last, "
        )
        text += f"{np.nanmin(values):.3f} to {np.nanmax(values):.3f}."
        unit = "evaluation loss (nats)" if name == "loss" else f"{name} (0 to 1)"
        draw = partial(_spread, results, f"eval_{name}", unit)
        yield RunFigure(f"client_eval_{name}", f"{name} across clients".capitalize(), text, draw)
    if not clients["participated"].all():
        text = f"Whose update was used in which round: {100 * clients['participated'].mean():.0f} % of all."
        height = 1.6 + 0.12 * min(40, max(10, info.num_clients))
        yield RunFigure("outcomes", "What became of each client's update", text, partial(_outcomes, results),
                        (5.4, height))  # fmt: skip


def _labels(results: Results, figure: Figure) -> None:
    axes, table, names = figure.subplots(), results.info.label_table, results.info.label_names
    image = draw_map(axes, table, None, cmap="cividis", vmin=0)
    name_rows(axes, client_labels(results.info), most=30)
    places = thinned(len(names), 40)
    size = "x-small" if len(places) > 10 else "small"
    axes.set_xticks(places, [shorten(names[place], 22) for place in places], rotation=90, fontsize=size)
    axes.set_ylabel("client")
    figure.colorbar(image, ax=axes, label="training examples", fraction=0.05, pad=0.02)


def _spread(results: Results, key: str, unit: str, figure: Figure) -> None:
    axes, values = figure.subplots(), results.clients[key]
    known = np.isfinite(values).any(axis=1)
    x = results.rounds["round_num"][known]
    low, first, middle, third, high = np.nanpercentile(values[known], (0, 25, 50, 75, 100), axis=1)
    if len(x) == 1:
        axes.errorbar(x, middle, [middle - low, high - middle], color=COLORS[0], alpha=0.4, capsize=6)
    axes.fill_between(x, low, high, color=COLORS[0], alpha=0.15, linewidth=0, label="all clients")
    axes.fill_between(x, first, third, color=COLORS[0], alpha=0.35, linewidth=0, label="middle half")
    draw_curve(axes, x, middle, COLORS[0], label="median")
    axes.set_ylim(0, float(high.max()) * 1.08 or 1)
    axes.set_ylabel(unit)
    round_axis(axes, results.rounds["round_num"])
    legend_above(axes, 3)


def _outcomes(results: Results, figure: Figure) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    axes, outcomes = figure.subplots(), results.clients["outcome"]
    codes = np.select([outcomes == name for name in _OUTCOMES], range(len(_OUTCOMES)), default=1)
    options = {"cmap": ListedColormap(_OUTCOME_COLORS), "vmin": -0.5, "vmax": len(_OUTCOMES) - 0.5}
    draw_map(axes, codes.T, results.rounds["round_num"], **options)
    round_axis(axes, results.rounds["round_num"])
    name_rows(axes, client_labels(results.info), most=30)
    axes.set_ylabel("client")
    present = [code for code in range(len(_OUTCOMES)) if (codes == code).any()]
    patches = [Patch(color=_OUTCOME_COLORS[code], label=_OUTCOMES[code]) for code in present]
    axes.legend(handles=patches, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, fontsize="small")
