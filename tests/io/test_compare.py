"""Comparisons of made-up runs: what is read, written and drawn."""

from __future__ import annotations

import csv
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from made_runs import make_run

from mpifedlora.core.comparison import Spread
from mpifedlora.errors import CheckpointError, ConfigError
from mpifedlora.io.compare import (
    Comparison,
    as_json,
    cells,
    escape_latex,
    head,
    latex_table,
    numbers,
    read_comparison,
    short_head,
    write_csv,
    write_figures,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("compare")
    return [
        make_run(folder / "sa-0", accuracy=0.6),
        make_run(folder / "sa-1", accuracy=0.5, seed=1),
        make_run(folder / "fedit-0", accuracy=0.62, method="fedit", bytes_each=2_000_000),
        make_run(folder / "fedit-1", accuracy=0.4, method="fedit", bytes_each=2_000_000, seed=1),
        make_run(folder / "fedavg", accuracy=0.3, method="fedavg", has_ranks=False, bytes_each=90_000_000,
                 training={"scope": "full"}),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def comparison(folders: list[Path]) -> Comparison:
    return read_comparison(folders)


def test_runs_are_read_as_their_results_say(comparison: Comparison) -> None:
    sa, fedit, fedavg = comparison.rows
    last = 1 - math.exp(-3)
    assert [row.label for row in comparison.rows] == ["sa-fedlora", "fedit", "fedavg"]
    assert (sa.num_runs, fedit.num_runs, fedavg.num_runs) == (2, 2, 1)
    assert sa.final == pytest.approx((0.55 * last, 0.1 / math.sqrt(2) * last))
    assert sa.wall_s.mean == 3 + 6 * 12
    assert fedavg.total_bytes.mean == pytest.approx(90 * sa.total_bytes.mean, rel=0.01)
    assert comparison.target == pytest.approx(0.95 * 0.55 * last)
    assert [row.is_efficient for row in comparison.rows] == [True, False, False]
    (note,) = comparison.notes
    assert "seeds differ" in note


def test_a_target_of_the_users_counts(folders: list[Path]) -> None:
    rows = read_comparison(folders, 0.45).rows
    assert [row.num_reached for row in rows] == [2, 1, 0]
    assert [cells(row)[6] for row in rows][1:] == ["1 of 2 runs", "-"]


def test_cells_fit_both_heads(comparison: Comparison) -> None:
    heads = head(comparison.metric), short_head(comparison.metric)
    assert {len(cells(row)) for row in comparison.rows} == {len(heads[0])} == {len(heads[1])}
    assert (heads[0][2], heads[1][2]) == ("final accuracy", "accuracy")
    sa, _, fedavg = (cells(row) for row in comparison.rows)
    assert sa[:4] == ("sa-fedlora", "2", "0.523 ± 0.067", "0.523 ± 0.067")
    assert fedavg[2] == "0.285"
    assert (sa[8], sa[9]) == ("1m15s", "yes")


def test_csv_has_plain_numbers_and_empty_cells(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    write_csv(path, [numbers(row, comparison.metric) for row in comparison.rows])
    with path.open(newline="") as stream:
        sa, _, fedavg = csv.DictReader(stream)
    assert float(sa["final_accuracy"]) == comparison.rows[0].final.mean
    assert float(sa["final_accuracy_sd"]) == comparison.rows[0].final.deviation
    assert fedavg["final_accuracy_sd"] == fedavg["bytes_to_target"] == ""
    assert "nan" not in path.read_text()


def test_latex_is_a_booktabs_table_of_escaped_cells(comparison: Comparison) -> None:
    row = comparison.rows[0]._replace(label="fedit, lora.rank_max=4 & 50% $x$ {~^\\")
    text = latex_table(comparison._replace(rows=[row, comparison.rows[1]]))
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert lines[0] == r"\begin{tabular}{lrrrrrrrr}"
    assert (lines[1], lines[3], lines[-2], lines[-1]) == (
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"\end{tabular}",
    )
    body = [lines[2], *lines[4:-2]]
    assert {line.replace(r"\&", "").count("&") for line in body} == {8}
    assert all(line.endswith(r" \\") for line in body)
    label = r"fedit, lora.rank\_max=4 \& 50\% \$x\$ \{\textasciitilde{}\textasciicircum{}\textbackslash{} & 2"
    assert lines[4].startswith(label)
    assert r"0.523 $\pm$ 0.067" in lines[4]
    assert "seeds differ" in text.splitlines()[0]


def test_latex_of_a_hostile_note_stays_a_comment(comparison: Comparison) -> None:
    text = latex_table(comparison._replace(notes=["one\n\\input{/etc/passwd}"]))
    assert [line for line in text.splitlines() if "passwd" in line] == [
        r"% not comparable as they are: one \input{/etc/passwd}"
    ]


def test_backslashes_are_escaped_once() -> None:
    assert escape_latex(r"\_") == r"\textbackslash{}\_"


def test_json_has_no_nan(comparison: Comparison) -> None:
    import json

    content = json.loads(json.dumps(as_json(comparison), allow_nan=False))
    assert [len(row["runs"]) for row in content["rows"]] == [2, 2, 1]
    assert content["rows"][2]["final_accuracy_sd"] is None


def test_figures_are_drawn_with_every_group_and_the_front(comparison: Comparison, tmp_path: Path) -> None:
    paths = write_figures(comparison, tmp_path / "figures")
    assert [path.name for path in paths] == [
        "accuracy_by_bytes.png",
        "accuracy_by_bytes.svg",
        "accuracy_by_round.png",
        "accuracy_by_round.svg",
    ]
    for path in paths[1::2]:
        words = {node.text for node in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}
        assert {"sa-fedlora", "fedit", "fedavg", f"target {comparison.target:.3f}"} <= words
        assert ("Pareto front" in words) == ("bytes" in path.name)


def test_runs_without_an_accuracy_have_rows_but_no_figure(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", every=100, num_finished=2, status="running", has_baselines=False)
    compared = read_comparison([folder, make_run(tmp_path / "b", num_finished=0, method="fedit")])
    assert [cells(row)[2:9] for row in compared.rows] == [
        ("-", "-", "2.7 MB", "-", "-", "-", "27s"),
        ("-", "-", "0 B", "-", "-", "-", "3s"),
    ]
    assert any("has not finished" in note for note in compared.notes)
    with pytest.raises(ConfigError, match="must have measured their accuracy"):
        write_figures(compared, tmp_path)


@pytest.fixture(scope="module")
def language_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("language")
    made = {"metrics": ("perplexity", "token_accuracy"), "has_accuracy": False}
    return [
        make_run(folder / "sa", accuracy=-0.6, **made),  # its perplexity falls
        make_run(folder / "fedit", accuracy=0.2, method="fedit", bytes_each=2_000_000, **made),
    ]


def test_without_an_accuracy_the_first_metric_of_the_task_is_compared(
    language_runs: list[Path], tmp_path: Path
) -> None:
    compared = read_comparison(language_runs)
    assert compared.metric == ("perplexity", True)
    sa, fedit = compared.rows
    assert sa.final.mean == sa.best.mean < 0 < fedit.best.mean < fedit.final.mean
    assert (sa.is_efficient, fedit.is_efficient) == (True, False)
    assert numbers(sa, compared.metric)["final_perplexity"] == sa.final.mean
    assert as_json(compared)["metric"] == "perplexity"
    assert "final perplexity" in latex_table(compared)
    assert "less is better" in latex_table(compared)
    paths = write_figures(compared, tmp_path)
    assert {path.stem for path in paths} == {"perplexity_by_bytes", "perplexity_by_round"}
    words = {node.text for node in ElementTree.parse(paths[1]).iter("{http://www.w3.org/2000/svg}text")}
    assert "perplexity" in words


def test_the_users_metric_and_direction_count(language_runs: list[Path], folders: list[Path]) -> None:
    more = read_comparison(language_runs, metric="perplexity", is_less_better=False)
    assert [row.is_efficient for row in more.rows] == [True, True]
    by_loss = read_comparison([*folders[:1], *language_runs[1:]], 1.4, metric="loss")
    assert [row.final.mean for row in by_loss.rows] == [1.0, 1.0]
    assert [row.rounds_to_target.mean for row in by_loss.rows] == [4, 4]
    with pytest.raises(ConfigError, match=r"all runs have, got accuracy .*sa-0: accuracy, .*choose loss"):
        read_comparison([*folders[:1], *language_runs], metric="accuracy")


@pytest.mark.parametrize(("target", "metric"), [(60, None), (math.nan, "loss"), (-0.1, "macro_f1")])
def test_a_target_that_cannot_be_is_refused(folders: list[Path], target: float, metric: str | None) -> None:
    with pytest.raises(ConfigError, match="the target must be"):
        read_comparison(folders, target, metric=metric)


def test_a_run_counts_once(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"must be named once, got .*sa-0 twice; leave one out"):
        read_comparison([folders[0], folders[1], folders[0].parent / "." / "sa-0"])


def test_a_folder_without_a_run_is_named(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must hold results"):
        read_comparison([folders[0], tmp_path])


def test_spreads_are_numbers_for_programs(comparison: Comparison) -> None:
    row = comparison.rows[0]._replace(wall_s=Spread(math.inf, math.nan))
    assert numbers(row, comparison.metric)["wall_s"] is None
