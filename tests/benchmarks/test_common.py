"""The benchmarks' own tools: timing in turn, reports with bounds, the comparison with committed results."""

import json
import math
import subprocess
import sys
from pathlib import Path

import check
import click
import common
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
RESULTS = sorted(common.RESULTS.glob("*.json"))
ENVIRONMENT = {
    *("commit", "date", "quick", "mpi", "cpu", "gpu", "num_cores", "num_nodes", "num_processes", "load"),
    *("python", "torch", "numpy", "threads", "seed"),
}


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that goes on only when it is told to."""

    class Clock:
        now = 100.0

        def sleep(self, seconds):
            self.now += seconds

    made = Clock()
    monkeypatch.setattr(common.time, "perf_counter", lambda: made.now)
    return made


def test_two_callables_are_timed_in_turn_and_change_places(clock):
    calls = []

    def first():
        calls.append("a")
        clock.sleep(1.0 + len(calls))

    def second():
        calls.append("b")
        clock.sleep(0.25)

    pair = common.alternate(first, second, repeats=3, warm_up=2, barrier=lambda: calls.append("|"))
    assert "".join(calls).replace("|", "") == "ab" + "ba" + "ab" + "ba" + "ab"
    # A barrier before and after each call; the calls before each timed one lengthen it.
    assert "".join(calls[:6]) == "|a||b|"
    assert pair.first_s == [1.0 + 14, 1.0 + 23, 1.0 + 26]
    assert pair.second_s == [0.25] * 3


def test_the_barrier_behind_a_call_counts(clock):
    pair = common.alternate(lambda: None, lambda: None, 1, 0, barrier=lambda: clock.sleep(0.5))
    assert pair == ([0.5], [0.5])


def test_what_is_done_aside_follows_the_first_and_takes_no_time(clock):
    calls = []

    def aside():
        calls.append("-")
        clock.sleep(5.0)

    pair = common.alternate(lambda: calls.append("a"), lambda: calls.append("b"), 2, 0, aside=aside)
    assert "".join(calls) == "a-bba-"
    assert pair == ([0.0, 0.0], [0.0, 0.0])


def test_pooled_pairs_keep_all_repeats():
    pairs = [common.Pair([1.0, 2.0], [3.0, 4.0]), common.Pair([5.0], [6.0])]
    assert common.pooled(pairs) == ([1.0, 2.0, 5.0], [3.0, 4.0, 6.0])


def test_the_ratio_of_a_pair_is_the_median_of_ratios_not_the_ratio_of_medians():
    assert common.Pair([1.0, 2.0, 9.0], [2.0, 1.0, 3.0]).ratio == 2.0


@pytest.mark.parametrize(
    ("value", "bounds", "holds"),
    [
        (1.05, {"at_most": 1.05}, True),
        (1.06, {"at_most": 1.05}, False),
        (0.5, {"at_least": 0.5}, True),
        (0.49, {"at_least": 0.5}, False),
        (3.0, {"at_least": 1.0, "at_most": 2.0}, False),
        (math.nan, {"at_most": 1.0}, False),
        (math.nan, {"at_least": 1.0}, False),
        (math.inf, {}, True),
    ],
)
def test_bounds(value, bounds, holds, capsys):
    report = common.Report("bench_x")
    report.ratio("ours / theirs", value, **bounds)
    assert report.finish(None) == (0 if holds else 1)
    verdict = ("holds" if holds else "BROKEN") if bounds else ""
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:3] == ["ours", "/", "theirs"]
    assert line.endswith(verdict or "inf")


def test_a_report_holds_what_was_measured_and_where(tmp_path):
    report = common.Report("bench_x", seed=7, num_nodes=2, num_processes=9)
    report.samples("ours_s", [0.5, 0.25], megabytes=2.7)
    report.sample("lost", math.inf)
    report.ratio("a / b", 0.5, at_most=1.0)
    report.ratio("free", math.nan)
    path = tmp_path / "new" / "bench_x.json"
    assert report.finish(path, lambda figure: figure.subplots().plot([1, 2], [2, 1])) == 0
    content = json.loads(path.read_text())
    assert tuple(content) == common.KEYS
    assert content["name"] == "bench_x"
    assert content["ratios"] == {"a / b": 0.5, "free": None}
    assert content["bounds"] == {"a / b": {"at_most": 1.0}}
    assert content["samples"] == [
        {"label": "ours_s", "value": 0.5, "megabytes": 2.7},
        {"label": "ours_s", "value": 0.25, "megabytes": 2.7},
        {"label": "lost", "value": None},
    ]
    environment = content["environment"]
    assert set(environment) == ENVIRONMENT
    assert (environment["seed"], environment["num_nodes"], environment["num_processes"]) == (7, 2, 9)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_label_counts_once():
    report = common.Report("bench_x")
    report.ratio("a", 1.0)
    with pytest.raises(ValueError, match=r"must differ, got 'a' twice \(bench_x\); rename one"):
        report.ratio("a", 2.0)


def test_without_matplotlib_there_is_no_figure_but_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    common.draw(tmp_path / "x.png", lambda figure: None)
    assert list(tmp_path.iterdir()) == []
    assert "pip install 'mpifedlora[plot]'" in capsys.readouterr().err


def test_lines_differ_in_more_than_colour(tmp_path):
    def draw(figure):
        axes = figure.subplots()
        lines = [axes.plot([0, 1], [0, index])[0] for index in range(len(common.COLORS))]
        assert len({line.get_color() for line in lines}) == len(lines)
        assert len({line.get_marker() for line in lines}) == len(lines)

    common.draw(tmp_path / "x.png", draw)
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ([], (False, None, 1)),
        (["--quick", "--json", "a.json", "--more", "3"], (True, Path("a.json"), 3)),
    ],
)
def test_options(arguments, got):
    seen = []

    @common.options
    @click.option("--more", default=1)
    def main(quick, json_path, more):
        """Do it."""
        seen.append((quick, json_path, more))
        return 5

    assert CliRunner().invoke(main, arguments).exit_code == 5
    assert seen == [got]
    assert "Do it." in CliRunner().invoke(main, ["--help"]).output


def results(name="bench_x", **ratios):
    bounds = {label: {"at_least" if label.startswith("gain") else "at_most": 1.0} for label in ratios}
    bounds.pop("free", None)
    return {"name": name, "ratios": ratios, "bounds": bounds}


@pytest.mark.parametrize(
    ("label", "old", "new", "line"),
    [
        ("cost", 1.0, 1.2, None),
        ("cost", 1.0, 1.21, "cost rose from 1.000 to 1.210"),
        ("cost", 1.0, 0.5, None),
        ("gain", 1.2, 1.0, None),
        ("gain", 1.2, 0.99, "gain fell from 1.200 to 0.990"),
        ("gain", 1.2, 9.0, None),
        ("free", 1.0, 9.0, None),
        ("cost", None, 9.0, None),
        ("cost", 1.0, None, "cost is not finite, was 1.000"),
    ],
)
def test_worse_follows_the_bound(label, old, new, line):
    found = list(check.worse(results(**{label: new}), results(**{label: old})))
    assert found == ([] if line is None else [line])


def test_a_new_label_is_no_regression():
    assert list(check.worse(results(cost=9.0), results(other=1.0))) == []


def test_check_warns_and_fails_only_where_told(tmp_path):
    committed, new, unknown = tmp_path / "results", tmp_path / "new.json", tmp_path / "unknown.json"
    committed.mkdir()
    (committed / "bench_x.json").write_text(json.dumps(results(cost=1.0, other=2.0)))
    new.write_text(json.dumps(results(cost=3.0, other=2.0, fresh=1.0)))
    unknown.write_text(json.dumps(results("bench_y", cost=3.0)))
    arguments = [str(new), str(unknown), "--results", str(committed)]
    outcome = CliRunner().invoke(check.main, arguments)
    assert outcome.exit_code == 0
    assert outcome.output.splitlines() == [
        "bench_x: 2 of 3 ratios compared with bench_x.json",
        "bench_y: nothing committed to compare with",
        "warning: bench_x: cost rose from 1.000 to 3.000",
    ]
    assert CliRunner().invoke(check.main, [*arguments, "--strict"]).exit_code == 1
    (committed / "bench_x.json").write_text(json.dumps(results(cost=3.0)))
    assert CliRunner().invoke(check.main, [*arguments, "--strict"]).exit_code == 0


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    sys.path[0] = script.rpartition("/")[0]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""


def test_every_script_explains_itself():
    scripts = [str(script) for script in sorted((ROOT / "benchmarks").glob("bench_*.py"))]
    assert scripts
    done = subprocess.run([sys.executable, "-c", HELP, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--json FILE") == done.stdout.count("--quick") == len(scripts)


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_committed_results_are_whole(file):
    content = json.loads(file.read_text())
    assert set(common.KEYS) <= set(content)
    assert set(content["environment"]) >= ENVIRONMENT
    assert content["name"] == file.stem
    assert not content["environment"]["quick"], "quick runs are no measurement"
    assert set(content["bounds"]) <= set(content["ratios"])
    assert all(set(sample) >= {"label", "value"} for sample in content["samples"])


@pytest.mark.parametrize(
    ("script", "compared"), [("bench_round", "round / bare"), ("bench_transport", "broadcast + collect / ")]
)
def test_a_benchmark_over_mpi_runs_to_its_end(tmp_path, script, compared):
    path = tmp_path / f"{script}.json"
    command = [ROOT / "benchmarks/run.sh", f"{script}.py", "2", "--quick", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode in (0, 1), done.stderr  # 1 where a bound is broken: this machine does other things
    content = json.loads(path.read_text()) if path.exists() else pytest.fail(done.stderr)
    assert content["environment"]["quick"]
    assert any(label.startswith(compared) for label in content["ratios"])
    assert all(ratio > 0 for ratio in content["ratios"].values())
    assert {sample["label"] for sample in content["samples"]} >= {"package_s", "bare_s"}
    assert path.with_suffix(".png").stat().st_size
