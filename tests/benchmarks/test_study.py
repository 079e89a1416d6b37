"""The study's design, records and tables: what is committed is what they say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import run as study
import tables
from design import ARMS, CORE, SEEDS, Trial, ablations, core, factors, local, search, small, tuning
from records import Point, Record, Records, chosen_rates, digest_of, tables_of

from mpifedlora.io.run_file import read_run_file, resolve_run

ROOT = Path(__file__).parents[2]


def made(arm: str, seed: int, accuracy: float, sent: int, rate: float = 4e-3, split: str = "test") -> Record:
    return Record(
        setting="20newsgroups",
        arm=arm,
        rate=rate,
        seed=seed,
        split=split,
        digest="",
        accuracy=accuracy,
        best_accuracy=accuracy,
        macro_f1=0.5,
        loss=1 - accuracy,
        uplink_bytes=sent // 2,
        downlink_bytes=sent // 2,
        sent_values=sent // 4,
        full_model_bytes=100_000_000,
        full_model_values=25_000_000,
        cpu_s=60.0,
        created="2026-11-28T19:00:00+00:00",
        commit="0123456789ab",
        machine="one",
    )


def curve_of(record: Record, *accuracies: float) -> list[Point]:
    trial = record.trial
    return [
        Point(**vars(trial), round_num=8 * i, sent_bytes=10_000_000 * i, lora_rank=4.0, accuracy=a, loss=1.0)
        for i, a in enumerate(accuracies, 1)
    ]


def added(folder: Path, *records: Record) -> Records:
    kept = Records(folder)
    for record in records:
        kept.add(record, curve_of(record, 0.4, record.accuracy))
    return kept


def test_pages_are_what_the_results_say() -> None:
    records = Records()
    for page in tables.PAGES:
        assert tables.rebuilt(page.read_text(), records) == page.read_text(), f"{page.name}: run tables.py"


def test_committed_runs_are_those_of_the_design() -> None:
    records = Records()
    assert records.runs
    stale = [trial.name for trial in records.runs if not records.has(trial)]
    assert not stale
    assert set(records.curves) == set(records.runs)
    for trial, record in records.runs.items():
        last = records.curves[trial][-1]
        assert (last.accuracy, last.sent_bytes) == (record.accuracy, record.sent_bytes)


def test_run_files_are_what_the_design_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = study.RUN_FILES
    monkeypatch.setattr(study, "RUN_FILES", tmp_path)
    study.write_run_files(chosen_rates(Records()))
    written = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*.toml")}
    assert written == {file.relative_to(committed): file.read_text() for file in committed.rglob("*.toml")}


def test_a_run_file_with_its_overrides_is_the_trial() -> None:
    file = study.RUN_FILES / "20newsgroups/sa-adapter.toml"
    trial = Trial("20newsgroups", "sa-adapter", 1e-3, 2, "validation")
    sets = [f"{key}={value}" for key, value in trial.overrides().items()]
    assert read_run_file(file, sets).config == resolve_run(tables_of(trial), {}).config


def test_every_trial_can_be_run() -> None:
    rates = chosen_rates(Records())
    reported = [*core(rates), *local(rates), *factors(rates), *small(rates)]
    assert len({digest_of(trial) for trial in reported}) == len(reported)
    for trial in {*reported, *search(), *tuning(), *ablations(rates)}:
        assert resolve_run(tables_of(trial), {}).config.federation.seed == trial.seed


def test_the_learning_rate_with_the_least_validation_loss_is_chosen(tmp_path: Path) -> None:
    arm = next(arm for arm in CORE if arm.follows is None)
    runs = [
        made(arm.name, 0, accuracy, 8_000_000, rate, "validation")
        for rate, accuracy in zip(arm.rates, (0.5, 0.7, 0.6), strict=False)
    ]
    records = added(tmp_path, *(replace(run, digest=digest_of(run.trial)) for run in runs))
    followers = [each.name for each in CORE if each.follows == arm.name]
    for name in (arm.name, *followers):
        assert chosen_rates(records)["20newsgroups", name] == arm.rates[1]
        assert chosen_rates(records)["20newsgroups-iid", name] == arm.rates[1]


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    records = added(tmp_path, made("fedavg", 0, 0.7, 100_000_000), made("sa-adapter", 1, 0.6, 2_000_000))
    again = Records(tmp_path)
    assert again.runs == records.runs
    assert again.curves == records.curves


def test_the_table_of_methods_by_hand(tmp_path: Path) -> None:
    fedavg, ours = ARMS["fedavg"].rates, ARMS["sa-adapter"].rates
    runs = [made("fedavg", seed, a, 100_000_000, _middle(fedavg)) for seed, a in ((0, 0.70), (1, 0.74))]
    runs += [made("sa-adapter", seed, a, 1_000_000, _middle(ours)) for seed, a in ((0, 0.69), (1, 0.76))]
    runs.append(made("fedit-r16", 0, 0.7, 8_000_000, split="validation"))
    _, _, first, second = tables.methods_table(added(tmp_path, *runs), "20newsgroups")
    assert first.split(" | ")[2:] == [
        "0.720 ± 0.028", "0.720", "", "50 / 50",
        "25 M", "0.00 %", "0.00 %", "12.50", "20", "16", "60", "2 |",
    ]  # fmt: skip
    assert second.split(" | ")[2:] == [
        "0.725 ± 0.049", "0.725", "+0.5 (-1.0, +2.0)", "0 / 0",
        "0 M", "99.00 %", "99.00 %", "0.12", "20", "16", "60", "2 |",
    ]  # fmt: skip


def test_twice_the_rounds_are_held_against_fedavg_of_the_core(tmp_path: Path) -> None:
    fedavg, ours = _middle(ARMS["fedavg"].rates), _middle(ARMS["sa-rated"].rates)
    runs = [made("fedavg", seed, a, 100_000_000, fedavg) for seed, a in ((0, 0.70), (1, 0.74))]
    longer = [made("fedavg", 0, 0.75, 200_000_000, fedavg), made("sa-rated", 0, 0.72, 4_000_000, ours)]
    runs += [replace(run, setting="20newsgroups-80-rounds") for run in longer]
    rows = [row.split(" | ")[2:] for row in tables.longer_table(added(tmp_path, *runs))[2:]]
    assert rows == [
        ["40", "0.720 ± 0.028", "", "100 MB", "0.00 %", "60", "2 |"],
        ["80", "0.750", "+5.0 (+5.0)", "200 MB", "-", "60", "1 |"],
        ["80", "0.720", "+2.0 (+2.0)", "4 MB", "96.00 %", "60", "1 |"],
    ]


def test_other_settings_take_over_the_learning_rate_of_their_data(tmp_path: Path) -> None:
    runs = [
        replace(made("fedavg", 0, accuracy, 8_000_000, rate, "validation"), setting=setting)
        for setting, best in (("20newsgroups", 6e-4), ("r52", 3e-4))
        for rate, accuracy in ((3e-4, 0.5 + (best == 3e-4)), (6e-4, 0.5 + (best == 6e-4)))
    ]
    rates = chosen_rates(added(tmp_path, *(replace(run, digest=digest_of(run.trial)) for run in runs)))
    assert rates["20newsgroups-iid", "fedavg"] == rates["20newsgroups-80-rounds", "fedavg"] == 6e-4
    assert rates["r52-80-rounds", "fedavg"] == 3e-4


def _middle(rates: tuple[float, ...]) -> float:
    return rates[len(rates) // 2]


def test_the_figure_is_drawn_from_what_there_is(tmp_path: Path) -> None:
    tables.write_figure(tmp_path / "curves.png", tables.draw_curves(Records()))
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_seeds_come_one_after_another() -> None:
    seeds = [trial.seed for trial in core(chosen_rates(Records()))]
    assert seeds == sorted(seeds)
    assert set(seeds) == set(SEEDS)


@pytest.mark.slow
def test_a_trial_is_run_and_kept(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/study/run.py"), "--quick", "--jobs", "1"]
    command += ["--stage", "core", "--only", "20newsgroups/sa-adapter/", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    records = Records(tmp_path / "quick/results")
    (record,) = records.runs.values()
    assert f"{record.trial.name}: accuracy" in done.stdout
    assert record.cpu_s > 1
    assert 0 < record.sent_bytes < 0.1 * record.full_model_bytes
    assert [point.round_num for point in records.curves[record.trial]] == [2]
