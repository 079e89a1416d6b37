"""What the scaling benchmark makes of its points, and how its job runs it over nodes."""

import os
import subprocess
from pathlib import Path

import bench_scaling
import common
import pytest
from bench_scaling import Fit, Point

ROOT = Path(__file__).parents[2]


def point(num_workers, server_s, *, way="whole", megabytes=2.7, kind="messages", num_clients=None, **changes):
    made = Point(
        kind=kind,
        way=way,
        megabytes=megabytes,
        num_workers=num_workers,
        num_clients=num_clients or num_workers,
        num_nodes=1,
        is_crowded=False,
        round_s=server_s + 0.5,
        train_s=0.5,
    )
    return made._replace(**changes)


def grid(one):
    sizes = [(workers, megabytes) for workers in (1, 3, 7, 15) for megabytes in bench_scaling.MEGABYTES]
    return [point(workers, one.seconds(workers, mb), way=one.way, megabytes=mb) for workers, mb in sizes]


@pytest.mark.parametrize("way", bench_scaling.WAYS)
@pytest.mark.parametrize("constants", [(0.002, 0.001, 0.0005), (0.0, 0.0, 0.0005), (0.002, 0.0, 0.0)])
def test_a_fit_finds_the_constants_that_made_the_points(way, constants):
    found = bench_scaling.fit(grid(Fit(way, *constants, 0.0)), way)
    assert found[1:4] == pytest.approx(constants, abs=1e-9)
    assert found.error == pytest.approx(0.0, abs=1e-9)


def test_the_model_by_hand():
    # 1,023 workers are ten levels.
    assert Fit("reduce", 1.0, 0.1, 0.01, 0.0).seconds(1023, 2.0) == pytest.approx(
        1 + 10 * 0.1 + 10 * 2 * 0.01
    )
    assert Fit("whole", 1.0, 0.1, 0.01, 0.0).seconds(1023, 2.0) == pytest.approx(1 + 102.3 + 20.46)


def test_constants_are_never_negative():
    falling = [point(workers, 1 / workers, megabytes=mb) for workers in (1, 2, 4) for mb in (1.0, 2.0)]
    assert min(bench_scaling.fit(falling, "whole")[1:4]) >= 0


def test_errors_are_relative_so_that_short_rounds_count():
    one, other = point(1, 1.0, megabytes=1.0), point(1, 3.0, megabytes=1.0)
    # x with the least (x/1 - 1)^2 + (x/3 - 1)^2
    assert bench_scaling.fit([one, other], "whole").seconds(1, 1.0) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("workers", "clients", "round_s", "expected"),
    [(4, 16, 2.0, 1.0), (4, 16, 4.0, 0.5), (4, 4, 0.5, 1.0), (2, 4, 2.0, 0.5)],
)
def test_efficiency(workers, clients, round_s, expected):
    first = point(1, 0.0, num_clients=4, round_s=2.0)
    later = point(workers, 0.0, num_clients=clients, round_s=round_s)
    assert bench_scaling.efficiency(first, later) == expected


def ratios(points):
    report = common.Report("bench_scaling")
    bench_scaling.record(report, points, [])
    content = report._content()
    return content["ratios"], content["bounds"]


def test_growth_is_held_where_each_process_has_a_core():
    points = [point(1, 1.0), point(4, 6.0), point(1, 1.0, way="reduce"), point(3, 3.0, way="reduce")]
    values, bounds = ratios(points)
    linear, levels = values
    assert values[linear] == 1.5
    assert values[levels] == 1.5  # three times the time at twice the levels
    assert bounds[linear] == bounds[levels] == {"at_most": bench_scaling.GROWTH_BOUND}
    assert "1 to 4 workers / linear" in linear
    assert "1 to 3 workers / logarithmic" in levels
    assert ratios([one._replace(is_crowded=True) for one in points]) == (values, {})


def test_runs_are_combined_and_the_first_counts(tmp_path):
    def write(name, *points):
        report = common.Report("bench_scaling")
        bench_scaling.record(report, points, [])
        report.finish(tmp_path / name)
        return tmp_path / name

    one, two, other = point(1, 1.0), point(2, 2.0), point(2, 9.0)
    files = [write("a.json", one, two), write("b.json", other, point(2, 3.0, num_nodes=2))]
    assert bench_scaling.read_points(files) == [one, two, point(2, 3.0, num_nodes=2)]


JOB_MPIRUN = """#!/usr/bin/env bash
echo "mpirun $*" >> "$LOG"
for word; do last=$word; done
[ "$2" -eq 6 ] && exit 1  # these nodes fail
echo '{}' > "$last"
"""
JOB_PYTHON = """#!/usr/bin/env bash
echo "python $*" >> "$LOG"
"""


def test_the_job_runs_each_node_count_once_and_combines_what_came(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "activate").write_text(f'PATH="{tools}:$PATH"\n')
    for name, text in (("mpirun", JOB_MPIRUN), ("python", JOB_PYTHON)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    settings = {"VENV": tmp_path, "OUT": tmp_path / "out", "LOG": tmp_path / "log", "TASKS": 3}
    slurm = {"SLURM_JOB_NUM_NODES": 4, "SLURM_JOB_ID": 1, "SLURM_SUBMIT_DIR": ROOT}
    environment = {**os.environ, **{name: str(value) for name, value in {**settings, **slurm}.items()}}
    subprocess.run(["bash", ROOT / "slurm/scaling.sbatch"], env=environment, check=True, capture_output=True)
    lines = (tmp_path / "log").read_text().splitlines()
    runs = [line.split() for line in lines[:-1]]
    assert [run[run.index("-n") + 1] for run in runs] == ["3", "6", "12"]  # 8 nodes are more than the job's
    groups = [[run[at + 1] for at, word in enumerate(run) if word == "--workers"] for run in runs]
    assert groups == [["1", "2", "2"], ["4", "5"], ["8", "11"]]
    combined = lines[-1].split()
    assert combined[1:3] == ["benchmarks/bench_scaling.py", "--combine"]
    out = tmp_path / "out"
    assert combined[3:] == [f"{out}/scaling-1.json", f"{out}/scaling-4.json", "--json", f"{out}/scaling.json"]
