"""The figure of a plan: what is drawn, from values as `plan --json` prints them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mpifedlora.errors import ConfigError
from mpifedlora.io.plan_figure import _draw, check_figure, write_plan_figure


def values(*, is_exact: bool) -> dict[str, Any]:
    def end(r: int, num_bytes: int) -> dict[str, Any]:
        return {"module_ranks": [r, r], "uplink_bytes": num_bytes, "downlink_bytes": 2 * num_bytes}

    rounds = [
        {
            "round_num": number,
            "stage": "initiating" if number < 3 else "annealing",
            "temperature": 1 - number / 10,
            "low": end(9 - number - (not is_exact), 10**6),
            "high": end(9 - number, 10**6 + 10**5 * (not is_exact)),
            "full_model_bytes_so_far": number * 10**8,
            "fixed_rank_bytes_so_far": number * 10**7,
        }
        for number in range(1, 6)
    ]
    return {"config": {"federation": {"method": "custom", "num_clients": 4}}, "rounds": rounds}


@pytest.mark.parametrize("is_exact", [True, False])
def test_exact_values_are_lines_and_bounds_are_bands(is_exact: bool) -> None:
    figure = Figure()
    _draw(values(is_exact=is_exact), figure)
    ranks, by_round, in_all, temperature = figure.axes
    assert [len(axes.collections) for axes in (ranks, by_round, in_all)] == (
        [0] * 3 if is_exact else [1, 2, 1]
    )
    assert temperature.lines[0].get_ydata() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    if is_exact:
        assert list(ranks.lines[0].get_ydata()) == [8, 7, 6, 5, 4]
        assert [list(line.get_ydata()) for line in by_round.lines] == [[1.0] * 5, [2.0] * 5]
        assert list(in_all.lines[0].get_ydata()) == [3, 6, 9, 12, 15]
        assert list(in_all.lines[1].get_ydata()) == [100, 200, 300, 400, 500]
    assert in_all.get_ylabel() == "MB so far"
    assert figure.get_suptitle() == "custom: 4 clients, 5 rounds"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_is_written_in_either_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"plan.{ending}"
    check_figure(path)
    write_plan_figure(path, values(is_exact=False))
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_other_endings_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--plot must end in \.png or \.svg, got plan\.pdf"):
        check_figure(tmp_path / "plan.pdf")
