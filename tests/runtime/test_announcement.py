from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import support

from mpifedlora.io.results_schema import RunInfo
from mpifedlora.io.run_file import ResolvedRun, read_run_file
from mpifedlora.runtime.announcement import (
    MAX_CLIENTS,
    MAX_LABELS,
    first_lines,
    label_lines,
    method_line,
    transport_line,
)

INFO = RunInfo(
    package_version="1.2",
    config="{}",
    method="custom",
    model="m",
    dataset="d",
    num_clients=4,
    num_workers=2,
    seed=0,
    mpi_library="Some MPI",
    survives_lost_workers=False,
    devices=("cpu, 1 thread",) * 3,
    eval_model="global",
    is_private=False,
    reproducible=True,
    collect="gather in parts",
    uplink_dtype="float32",
    downlink_dtype="float32",
    gpu_buffers="none",
    startup_s=3.14,
    module_names=("q", "v"),
    label_names=("animals", "food", "music"),
    label_table=np.array([[5, 0, 2], [0, 3, 0], [1, 1, 1], [0, 0, 0]]),
)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.make_run_file(tmp_path_factory.mktemp("run"))


def resolve(run_file: Path, *overrides: str) -> ResolvedRun:
    return read_run_file(run_file, overrides)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            [],
            "A and B trained, rank 4 to 1 (linear, freeze), factors aggregation, "
            "initiating 1 round (adapter), momentum on the server",
        ),
        (["federation.method=fedavg"], "the whole model trained"),
        (["federation.method=scaffold"], "the whole model trained, equal weights, control variates"),
        (["federation.method=ffa-lora"], "B trained, rank 4, factors aggregation"),
        (["federation.method=rolora"], "B and A trained in turn, rank 4, factors aggregation"),
        (
            ["federation.method=fedsa-lora"],
            "A and B trained, rank 4, factors aggregation, b kept by its client, own models measured",
        ),
        (
            ["federation.method=hetlora", "lora.client_ranks=[1, 2]"],
            "A and B trained, rank 4, clients' ranks 1 to 2, zero-pad aggregation, frobenius weights",
        ),
        (
            ["federation.method=fedadam", "aggregation.robust=median"],
            "the whole model trained, fedadam on the server, median",
        ),
        (
            [
                "federation.method=fedavg",
                "privacy.clip_norm=0.5",
                "privacy.noise_multiplier=1.5",
                "aggregation.weights=equal",
            ],
            "the whole model trained, equal weights, updates clipped to 0.5, noise 1.5",
        ),
    ],
)
def test_method_line_names_the_switches_that_do_something(
    run_file: Path, overrides: list[str], line: str
) -> None:
    assert method_line(resolve(run_file, *overrides).config) == line


IN_PARTS = "updates are aggregated part by part while they come in"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, f"{IN_PARTS}; ready 3.1 s after the launch"),
        ({"startup_s": math.nan}, IN_PARTS),
        ({"collect": "gather", "startup_s": math.nan}, "updates are gathered and then aggregated"),
        ({"collect": "reduce", "startup_s": math.nan}, "updates are added up on the way to the server"),
        ({"collect": "handed over", "startup_s": math.nan}, "updates are handed over in memory"),
        ({"uplink_dtype": "int8", "startup_s": math.nan}, f"{IN_PARTS}, as int8 up and float32 down"),
        (
            {"downlink_dtype": "bfloat16", "gpu_buffers": "staged"},
            f"{IN_PARTS}, as float32 up and bfloat16 down, GPU buffers staged; ready 3.1 s after the launch",
        ),
    ],
)
def test_transport_line_says_how_updates_cross(changes: dict[str, object], line: str) -> None:
    assert transport_line(replace(INFO, **changes)) == line


def test_label_table_by_hand() -> None:
    lines = list(label_lines(INFO.label_table, INFO.label_names))
    assert [line.split() for line in lines[1:]] == [
        ["client", "all", "animals", "food", "music"],
        ["0", "7", "5", "0", "2"],
        ["1", "3", "0", "3", "0"],
        ["2", "3", "1", "1", "1"],
        ["3", "0", "0", "0", "0"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1


def test_large_label_tables_are_cut_and_say_so() -> None:
    table = np.arange(30 * 25).reshape(30, 25)
    lines = list(label_lines(table, [f"label {label}" for label in range(25)]))
    assert len(lines) == MAX_CLIENTS + 3
    assert lines[-1].startswith(f"... and {30 - MAX_CLIENTS} more clients")
    first = [int(cell) for cell in lines[2].split()]
    assert first[1] == table[0].sum() == sum(first[2:])  # the rarer labels are the last column
    assert len(first) == 2 + MAX_LABELS + 1
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize(
    ("changes", "overrides", "note"),
    [
        ({}, [], "note: 1 clients have no examples and never take part: 3"),
        ({"is_private": True, "reproducible": False}, [], "noise and cohorts come from the system's entropy"),
        (
            {},
            ["federation.method=fedavg", "privacy.clip_norm=1", "privacy.noise_multiplier=1"]
            + ["privacy.noise_seed=1", "aggregation.weights=equal"],
            "this run is not private",
        ),
        ({"num_workers": 6}, [], "note: 6 workers for 4 clients: 2 of them have nothing to train"),
        ({"devices": ("a", "b", "b"), "reproducible": False}, [], "devices or threads differ"),
        ({}, ["federation.method=fedavg"], "what the run file says of them is ignored"),
        ({}, [], "a process that dies ends this job (--resume goes on); `mpifedlora doctor` says"),
    ],
)
def test_notes_say_what_deserves_attention(
    run_file: Path, changes: dict[str, object], overrides: list[str], note: str
) -> None:
    lines = list(first_lines(resolve(run_file, *overrides), replace(INFO, **changes), 10**6, run_file.parent))
    assert sum(note in line for line in lines) == 1


def test_nothing_to_note_gives_no_note(run_file: Path) -> None:
    info = replace(INFO, label_table=np.ones((4, 3), int), survives_lost_workers=True)
    lines = list(first_lines(resolve(run_file), info, 1_500_000, run_file.parent))
    assert not any(line.startswith("note") for line in lines)
    assert lines[0] == "mpifedlora 1.2: custom on d with m, 1.5 M parameters, 2 adapted layers"
    assert lines[1] == "4 clients on 2 workers (cpu, 1 thread), 4 rounds, seed 0, Some MPI, workers may die"
    assert lines[3] == transport_line(info)
