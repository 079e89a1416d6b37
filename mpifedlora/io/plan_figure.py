"""The figure of a plan: rank and temperature, bytes by round, and bytes in all against other methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpifedlora.errors import ConfigError
from mpifedlora.io.figures import COLORS, require_matplotlib, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
_FORMATS = (".png", ".svg")
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def check_figure(path: Path) -> None:
    """Check that a figure can be drawn there, before anything takes time.

    Raises:
        ConfigError: if its ending is no known format, or matplotlib is missing.
    """
    if path.suffix not in _FORMATS:
        raise ConfigError(f"--plot must end in .png or .svg, got {path.name}; choose one of them")
    require_matplotlib("--plot")


def write_plan_figure(path: Path, values: Mapping[str, Any]) -> None:
    """Draw a plan into a file.

    Args:
        path: of the file, .png or .svg.
        values: of `runtime.outlook_text.outlook_values`.
    """
    write_figure(path, partial(_draw, values), (8, 9))


def _draw(values: Mapping[str, Any], figure: Figure) -> None:
    rounds = values["rounds"]
    numbers = np.array([one["round_num"] for one in rounds], float)
    ranks, by_round, in_all = figure.subplots(3, 1, sharex=True)
    federation = values["config"]["federation"]
    figure.suptitle(f"{federation['method']}: {federation['num_clients']} clients, {len(rounds)} rounds")
    _shade(rounds, (ranks, by_round, in_all))
    _draw_ranks(ranks, numbers, rounds)
    _draw_bytes(by_round, numbers, rounds)
    _draw_totals(in_all, numbers, values)
    in_all.set_xlabel("round")
    in_all.set_xlim(0.5, len(rounds) + 0.5)
    for axis in (in_all.xaxis, ranks.yaxis):
        axis.get_major_locator().set_params(integer=True)


def _shade(rounds: Sequence[Mapping[str, Any]], all_axes: Sequence[Axes]) -> None:
    last = max((one["round_num"] for one in rounds if one["stage"] == "initiating"), default=0)
    for axes in all_axes if last else ():
        axes.axvspan(0.5, last + 0.5, color="0.92", zorder=0)
    if last:
        top = all_axes[0].get_xaxis_transform()
        all_axes[0].text(0.6, 1.02, "initiating", transform=top, color="0.35", fontsize=10)


def _both(rounds: Sequence[Mapping[str, Any]], name: str) -> tuple[Floats, Floats]:
    low, high = (np.array([np.mean(one[end][name]) for one in rounds]) for end in ("low", "high"))
    return low, high


def _line(
    axes: Axes, numbers: Floats, ends: tuple[Floats, Floats], label: str, place: int, scale: float = 1.0
) -> None:
    low, high = (end / scale for end in ends)
    if np.array_equal(low, high):
        every = max(1, len(numbers) // 20)
        axes.plot(numbers, high, color=COLORS[place], marker="osD"[place % 3], markevery=every, label=label)
    else:
        shown = f"{label}, bounds"
        axes.fill_between(numbers, low, high, label=shown, color=COLORS[place], alpha=0.4, linewidth=1.5)


def _draw_ranks(axes: Axes, numbers: Floats, rounds: Sequence[Mapping[str, Any]]) -> None:
    ends = _both(rounds, "module_ranks")
    _line(axes, numbers, ends, "mean rank of a module", 0)
    axes.set_ylabel("LoRA rank")
    axes.set_ylim(0, 1.05 * max(1.0, ends[1].max()))  # as high as the temperature's
    twin = axes.twinx()
    twin.spines["right"].set_visible(True)
    twin.grid(False)
    temperature = [one["temperature"] for one in rounds]
    twin.plot(numbers, temperature, color=COLORS[1], marker="", linestyle="--", label="temperature")
    twin.set_ylabel("temperature")
    twin.set_ylim(0, 1.05)
    handles = [*axes.get_legend_handles_labels()[0], *twin.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="lower left")


def _unit(largest: float) -> tuple[str, float]:
    return next((pair for pair in _UNITS if largest >= pair[1]), ("B", 1.0))


def _draw_bytes(axes: Axes, numbers: Floats, rounds: Sequence[Mapping[str, Any]]) -> None:
    up, down = _both(rounds, "uplink_bytes"), _both(rounds, "downlink_bytes")
    name, scale = _unit(max(up[1].max(), down[1].max()))
    _line(axes, numbers, up, "up, from the clients", 0, scale)
    _line(axes, numbers, down, "down, to the clients", 1, scale)
    axes.set_ylabel(f"{name} in a round")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left")


def _draw_totals(axes: Axes, numbers: Floats, values: Mapping[str, Any]) -> None:
    up, down = (_both(values["rounds"], f"{way}link_bytes") for way in ("up", "down"))
    low, high = (np.cumsum(one + other) for one, other in zip(up, down, strict=True))
    others = {"full-model FedAvg": "full_model_bytes_so_far", "fixed rank": "fixed_rank_bytes_so_far"}
    name, scale = _unit(high[-1])
    _line(axes, numbers, (low, high), "this run", 0, scale)
    for place, (label, key) in enumerate(others.items(), 1):
        total = np.array([one[key] for one in values["rounds"]]) / scale
        axes.plot(numbers, total, color=COLORS[place], linestyle="--", marker="", label=label)
    axes.set_yscale("log")
    axes.set_ylabel(f"{name} so far")
    axes.legend(loc="lower right")
