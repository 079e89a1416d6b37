"""What `plan` says against what real runs send: whole federations in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federations import PRESETS, TWO_OF_FOUR, UNLIKE, VARIANTS
from support import make_run_file

from mpifedlora.core.methods import METHODS
from mpifedlora.core.units import human_bytes
from mpifedlora.errors import ConfigError
from mpifedlora.io.results import Results, read_results
from mpifedlora.runtime import launch
from mpifedlora.runtime.building import build_model, build_task
from mpifedlora.runtime.outlook import Outlook, look_ahead
from mpifedlora.runtime.outlook_text import MOST_LINES, outlook_lines, outlook_values

WIRE = ["transport.uplink_dtype=int8", "transport.downlink_dtype=bfloat16"]
EXACT = {
    **{name: PRESETS[name] for name in ("fedavg", "flora", "fedex-lora", "ffa-lora")},
    "freeze, cohort": [TWO_OF_FOUR, "federation.num_rounds=6"],
    "drop, wire": ["annealing.cut=drop", *WIRE, TWO_OF_FOUR],
    "full first, wire": ["initiating.scope=full", *WIRE, TWO_OF_FOUR],
    "poisson": ["federation.sampling=poisson", TWO_OF_FOUR, "annealing.schedule=cosine"],
    **{
        name: VARIANTS[name]
        for name in ("rolora, cohort", "fedsa-lora, cohort", "scaffold with cuts", "flora, ranks")
    },
    "median": VARIANTS["median"],
}
BOUNDED = {
    "spectral": ["annealing.allocation=spectral", TWO_OF_FOUR],
    "metropolis": VARIANTS["metropolis"],
    "target": VARIANTS["target"],
    "private": VARIANTS["private ffa-lora"],
    "norm bound": [*PRESETS["flora"], UNLIKE, "aggregation.norm_bound=0.01"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("outlook")
    make_run_file(made)
    return made


def planned(folder: Path, settings: list[str], num_workers: int | None = None) -> Outlook:
    return look_ahead(folder / "run.toml", settings, num_workers, calibrates=False)


def ran(folder: Path, settings: list[str], out: Path) -> Results:
    assert launch.run(folder / "run.toml", settings, out, False) == 0
    return read_results(out / "results.h5")


def bytes_of(outlook: Outlook, end: str) -> dict[str, list[int]]:
    ends = [getattr(one, end) for one in outlook.rounds]
    return {
        "uplink_bytes": [one.uplink.bytes for one in ends],
        "downlink_bytes": [one.downlink.bytes for one in ends],
    }


@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
def test_a_run_sends_what_was_planned_to_the_byte(folder: Path, tmp_path: Path, settings: list[str]) -> None:
    outlook, results = planned(folder, settings), ran(folder, settings, tmp_path / "run")
    assert outlook.is_exact
    for name, counted in bytes_of(outlook, "high").items():
        assert counted == results.rounds[name].tolist()
    values = outlook_values(outlook)
    ranks = [one["high"]["module_ranks"] for one in values["rounds"]]
    assert ranks == results.rounds["module_ranks"].tolist()
    assert [one["temperature"] for one in values["rounds"]] == results.rounds["temperature"].tolist()
    took_part = [[worker >= 0 for worker in one["workers"]] for one in values["rounds"]]
    assert took_part == results.clients["participated"].tolist()
    assert values["label_table"] == results.info.label_table.tolist()
    assert results.baselines is not None
    totals = [values[name]["high"] for name in ("sent_bytes", "full_model_bytes", "fixed_rank_bytes")]
    baselines = results.baselines
    assert totals == [baselines.sent_bytes, baselines.full_model_bytes, baselines.fixed_rank_bytes]
    last = values["rounds"][-1]
    assert [last["full_model_bytes_so_far"], last["fixed_rank_bytes_so_far"]] == totals[1:]


@pytest.mark.parametrize("settings", BOUNDED.values(), ids=BOUNDED)
def test_a_run_that_goes_by_its_values_sends_what_lies_within_the_bounds(
    folder: Path, tmp_path: Path, settings: list[str]
) -> None:
    settings = [
        one for one in settings if not one.startswith("privacy.noise_seed")
    ]  # then cohorts are hidden
    outlook, results = planned(folder, settings), ran(folder, settings, tmp_path / "run")
    assert not outlook.is_exact
    assert outlook.reasons
    low, high = bytes_of(outlook, "low"), bytes_of(outlook, "high")
    for name in low:
        counted = results.rounds[name]
        assert np.all(np.array(low[name]) <= counted)
        assert np.all(counted <= np.array(high[name]))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_planned(folder: Path, method: str) -> None:
    outlook = planned(folder, [f"federation.method={method}"])
    assert outlook.is_exact
    assert sum(one.high.uplink.bytes for one in outlook.rounds) > 0


@pytest.mark.parametrize("head", ["mean_pooling", "stock"])
def test_shapes_without_weights_are_those_of_the_model(folder: Path, head: str) -> None:
    settings = [f"model.head={head}"]
    outlook = planned(folder, settings)
    base, _ = build_task(outlook.config, outlook.data.dataset.label_names)
    assert build_model(outlook.config, base).shapes == outlook.shapes


def test_a_builder_that_looks_at_the_weights_gets_them(folder: Path, tmp_path: Path) -> None:
    builder = tmp_path / "mytask.py"
    builder.write_text(
        "from mpifedlora.training.tasks import TASKS\n"
        "def build(setup):\n"
        "    base, task = TASKS['classification'](setup)\n"
        "    assert float(next(base.module.parameters()).abs().sum()) > 0\n"
        "    return base, task\n"
    )
    own = planned(folder, [f"task.name={builder}:build", "data.label_column=label"])
    assert own.shapes == planned(folder, []).shapes


def test_a_calibration_times_real_steps_of_every_scope(folder: Path) -> None:
    settings = ["initiating.scope=full", "evaluation.every=2"]
    outlook = look_ahead(folder / "run.toml", settings, 2, calibrates=True)
    speed, times = outlook.speed, outlook.times()
    assert speed is not None
    assert set(speed.steps) == {"full", "adapter"}
    assert [r for r, _ in speed.steps["adapter"]] == [1.0, 3.0]
    assert all(seconds > 0 for pairs in speed.steps.values() for _, seconds in pairs)
    assert speed.num_steps == 9
    # Two steps for each of four clients, on two workers: the first round trains the whole model.
    step_s = speed.steps["full"][0][1]
    assert times[0].train_s == pytest.approx(4 * step_s)
    assert times[0].all_train_s == pytest.approx(8 * step_s)
    assert [one.evaluate_s > 0 for one in times] == [False, True, False, True]
    apart, shared = outlook.round_s(is_shared=False), outlook.round_s(is_shared=True)
    assert all(one <= other for one, other in zip(apart, shared, strict=True))
    assert all(one >= time.train_s for one, time in zip(apart, times, strict=True))
    # Ranks between those that were measured lie on the line between them.
    low, high = (seconds for _, seconds in speed.steps["adapter"])
    assert speed.step_s("adapter", 2.0) == pytest.approx((low + high) / 2)


def test_the_lines_fit_a_small_terminal_and_hold_the_totals(folder: Path) -> None:
    outlook = look_ahead(folder / "run.toml", [], 3, calibrates=True)
    lines = list(outlook_lines(outlook, 80))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "4 clients on 3 workers (1 to 2 clients each) and a server (mpirun -n 4)" in text
    assert "exact, as long as no client and no worker fails" in text
    assert "time" in text
    assert "measured on cpu, 1 thread" in text


def test_bounds_are_shown_as_such_with_their_reason(folder: Path) -> None:
    lines = list(outlook_lines(planned(folder, ["annealing.allocation=spectral"]), 160))
    assert any("bounds, as long as" in line for line in lines)
    assert any('annealing.allocation = "spectral" follows the updates' in line for line in lines)
    assert not any("time" in line.split()[-1:] for line in lines)  # no column without a calibration


def test_many_rounds_are_told_in_few_lines(folder: Path) -> None:
    settings = ["federation.num_rounds=400", "lora.rank_max=4", TWO_OF_FOUR]
    outlook = planned(folder, settings)
    lines = list(outlook_lines(outlook, 80))
    begin = next(number for number, line in enumerate(lines) if line.startswith("rounds"))
    table = lines[begin + 1 : lines.index("", begin)]
    assert len(table) <= MOST_LINES
    spans = [[int(number) for number in line.split()[0].split("-")] for line in table]
    covered = [number for span in spans for number in range(span[0], span[-1] + 1)]
    assert covered == list(range(1, 401))
    downs = [one.high.downlink.bytes for one in outlook.rounds[spans[-1][0] - 1 :]]
    assert human_bytes(max(downs)) in table[-1]
    assert human_bytes(min(downs)).split()[0] in table[-1]


def test_values_are_json(folder: Path) -> None:
    values: dict[str, Any] = json.loads(json.dumps(outlook_values(planned(folder, [], 2))))
    assert values["num_workers"] == 2
    assert values["clients_per_worker"] == [2, 2]
    assert values["memory"]["server"]["total_bytes"] > values["memory"]["gpu"]["total_bytes"] > 0
    assert values["time"] is None


def test_wrong_input_is_told_as_a_run_tells_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank_max"):
        planned(folder, ["lora.rank_max=0"])
