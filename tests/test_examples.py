"""Each file in examples/ runs: on tiny models and data, and in small on its own where that is fetched."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpifedlora.io import data_fetch
from mpifedlora.io.results import read_results
from mpifedlora.io.run_file import read_run_file
from mpifedlora.runtime import launch

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.toml"))
SMALL = [
    "federation.num_rounds=2",
    "initiating.rounds=0",
    "annealing.heating_rounds=0",
    "lora.rank_max=3",
    "lora.rank_min=1",
    "training.batch_size=4",
    "training.device=cpu",
    "training.threads=1",
    "evaluation.max_examples=20",
]
IS_THERE = {entry.name: entry.present for entry in data_fetch.available()}


def settings_of(config):
    """Return what makes a run of an example small, whatever it trains on."""
    is_shared_out = config.data.partition != "files"
    clients = ["federation.num_clients=2", "data.max_examples=40"] if is_shared_out else []
    cohort = ["federation.cohort_size=1"] if config.federation.cohort_size else []
    steps = [] if config.training.local_epochs else ["training.local_steps=1"]
    return [*SMALL, *clients, *cohort, *steps]


def prepare(name, tiny_csv):
    """Do what the first lines of an example tell to do before it; skip where its data are not fetched."""
    header = (ROOT / "examples" / name).read_text().split("\n\n[")[0]
    scripts = re.findall(r"^#   python (examples/\S+)(.*)$", header, re.MULTILINE)
    text = (
        "".join((ROOT / script).read_text() for script, _ in scripts) + (ROOT / "examples" / name).read_text()
    )
    missing = [each for each, is_there in IS_THERE.items() if f'"{each}"' in text and not is_there]
    if missing:
        pytest.skip(f"needs what is not fetched: mpifedlora data fetch {' '.join(missing)}")
    for script, arguments in scripts:
        subprocess.run([sys.executable, ROOT / script, *arguments.split()], check=True, timeout=120)
    shutil.copy(tiny_csv, "my_texts.csv")


def check(out):
    results = read_results(out / "results.h5")
    assert results.status == "finished"
    assert len(results.rounds["round_num"]) == 2
    assert (results.rounds["uplink_bytes"] > 0).all()
    assert results.rounds["module_ranks"].max(axis=1).tolist() == [3, 1]


@pytest.mark.parametrize("name", ["newsgroups.toml", "own_csv.toml", "own_task.toml", "reuters.toml"])
def test_example_of_texts_on_tiny_ones(name, tmp_path, monkeypatch, tiny_model_folder, tiny_csv):
    """The run file as it is, with another model and other texts."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_csv, "my_texts.csv")
    settings = settings_of(read_run_file(ROOT / "examples" / name).config)
    settings += [f"model.name={tiny_model_folder}", f"data.source={tiny_csv}", "data.max_length=32"]
    assert launch.run(ROOT / "examples" / name, settings, Path("out"), False) == 0
    check(Path("out"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_on_its_own_data(name, tmp_path, monkeypatch, tiny_csv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prepare(name, tiny_csv)
    settings = settings_of(read_run_file(ROOT / "examples" / name).config)
    assert launch.run(ROOT / "examples" / name, settings, Path("out"), False) == 0
    check(Path("out"))


def test_notebook(tmp_path, monkeypatch, tiny_run_file):
    """Every cell, one after another, on a tiny run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    text = (ROOT / "examples/notebook.py").read_text()
    tiny = text.replace('"examples/newsgroups.toml"', repr(str(tiny_run_file)))
    assert tiny != text
    (tmp_path / "notebook.py").write_text(tiny)
    cells = runpy.run_path(str(tmp_path / "notebook.py"))
    assert len(cells["results"].rounds["round_num"]) == 6
    assert cells["fixed"].info.method == "fedit"
    assert (tmp_path / "runs/notebook/accuracy.png").stat().st_size > 1000
