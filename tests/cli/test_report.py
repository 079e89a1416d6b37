from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from made_runs import make_run

from mpifedlora.cli.main import main


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "a")
    make_run(folder / "b", method="fedit", accuracy=0.4, data={"alpha": 0.1})
    make_run(folder / "none", num_finished=0)
    return folder


def test_report_says_where_the_page_is(runs: Path, tmp_path: Path) -> None:
    result = invoke("report", str(runs / "none"), "--out", str(tmp_path / "r"))
    assert result.exit_code == 0, result.output
    assert f"page     {tmp_path / 'r' / 'report.html'}" in result.output
    assert (tmp_path / "r" / "report.html").exists()


def test_report_as_json(runs: Path) -> None:
    result = invoke("report", str(runs / "none"), "--json")
    assert json.loads(result.output) == {"page": str(runs / "none" / "report" / "report.html"), "figures": []}


def test_compare_prints_a_table_with_its_notes(runs: Path, tmp_path: Path) -> None:
    files = [tmp_path / "t.csv", tmp_path / "t.tex"]
    result = invoke("compare", str(runs / "a"), str(runs / "b"), "--target", "0.3", "--csv", str(files[0]),
                    "--latex", str(files[1]))  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    (row,) = [line for line in lines if line[:1] == ["fedit"]]
    assert row[:4] == ["fedit", "1", "0.380", "0.380"]
    assert "target accuracy 0.300" in result.output
    assert "not comparable as they are: data.alpha differs (sa-fedlora: 0.5; fedit: 0.1)" in result.output
    assert all(path.stat().st_size > 100 for path in files)


def test_compare_as_json_names_its_figures(runs: Path, tmp_path: Path) -> None:
    result = invoke("compare", str(runs / "a"), "--json", "--out", str(tmp_path))
    content = json.loads(result.output)
    assert content["rows"][0]["label"] == "sa-fedlora"
    assert sorted(Path(path).name for path in content["figures"]) == sorted(
        p.name for p in tmp_path.iterdir()
    )


def test_compare_by_another_metric(runs: Path) -> None:
    result = invoke("compare", str(runs / "a"), str(runs / "b"), "--metric", "loss", "--target", "1.5")
    assert result.exit_code == 0, result.output
    assert "target loss 1.500 (less is better)" in result.output
    unknown = invoke("compare", str(runs / "a"), "--metric", "bleu")
    assert unknown.exit_code != 0
    assert "got bleu" in str(unknown.exception)


@pytest.mark.parametrize("arguments", [["compare"], ["compare", "x", "--target", "most"], ["report"]])
def test_wrong_usage(arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2
