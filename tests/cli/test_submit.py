import re

import pytest
from click.testing import CliRunner

from mpifedlora.cli.main import main
from mpifedlora.errors import ConfigError

RUN = '[model]\nname = "minilm"\n[data]\nsource = "reuters-r8"\n[federation]\nnum_clients = 16\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A current folder with a run file, and an sbatch that keeps the script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "posts.toml").write_text(RUN)
    (tmp_path / "sbatch").write_text("#!/bin/sh\ncat >script\necho 41\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def submit(*arguments):
    return CliRunner().invoke(main, ["submit", "posts.toml", *arguments])


def test_submits_what_a_dry_run_prints(folder):
    arguments = ("--nodes", "2", "--gpus-per-node", "4", "--clients-per-gpu", "2", "--time", "4:00:00")
    printed = submit(*arguments, "--dry-run").stdout
    assert printed.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=posts\n#SBATCH --nodes=2\n")
    assert not (folder / "script").exists()
    result = submit(*arguments)
    assert (result.exit_code, (folder / "script").read_text()) == (0, printed)
    assert result.stdout.splitlines() == [
        "job 41: 1 server and 16 workers on 2 nodes",
        "state    squeue --job=41",
        f"log      {folder}/posts-41.out",
        f"results  {folder}/runs/posts-41",
    ]


def test_every_option_reaches_the_script(folder):
    (folder / "list").write_text("training.mu=0\ntraining.mu=1\n")
    options = ("--workers-per-node", "3", "--time", "90", "--out", "o", "--set", "lora.rank_max=8")
    more = ("--array", "list", "--sbatch=--mem=8G", "--sbatch", "-p gpu", "--launcher", "srun")
    text = submit(*options, *more, "--dry-run").stdout
    for line in (
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --time=90",
        "#SBATCH --array=1-2",
        "#SBATCH --mem=8G",
        "#SBATCH -p gpu",
        f"run_file={folder}/posts.toml",
        f"out={folder}/o/$SLURM_ARRAY_TASK_ID",
        "settings=(--set lora.rank_max=8)",
        "    2) settings+=(--set training.mu=1) ;;",
        "workers_per_node=3",
        "launcher=srun",
    ):
        assert re.search(f"^{re.escape(line)}$", text, re.MULTILINE), line


def test_a_job_that_does_not_fit_is_not_submitted(folder):
    result = submit("--workers-per-node", "17", "--time", "90")
    assert isinstance(result.exception, ConfigError)
    assert "got 17 workers" in str(result.exception)
    assert not (folder / "script").exists()


@pytest.mark.parametrize("arguments", [[], ["--time", "9", "--nodes", "0"], ["--time", "9", "--nodes", "x"]])
def test_usage(arguments):
    assert submit(*arguments).exit_code == 2


def test_memory_is_asked_for_and_checked(folder, tiny_model_folder):
    model = ("--set", f"model.name={tiny_model_folder}")
    result = submit("--workers-per-node", "2", "--time", "90", *model, "--mem", "2500M", "--dry-run")
    assert "\n#SBATCH --mem=2500M\n" in result.stdout
    assert result.stderr.startswith("memory   the first node 1.7G to 1.7G (server 0.6G, worker 0.6G)")
    refused = submit("--workers-per-node", "2", "--time", "90", *model, "--mem", "1G")
    assert "the first node must have at least 1.7G, got --mem = 1.0G" in str(refused.exception)
    assert not (folder / "script").exists()
