import sys
from pathlib import Path

import pytest

from mpifedlora.errors import ConfigError
from mpifedlora.io import slurm_submit
from mpifedlora.io.slurm_script import Job

RUN = '[model]\nname = "minilm"\n[data]\nsource = "reuters-r8"\n[federation]\nnum_clients = 4\n'


@pytest.fixture
def job(tmp_path):
    (tmp_path / "run.toml").write_text(RUN)
    sizes = {"num_nodes": 2, "gpus_per_node": 0, "workers_per_node": 2, "time_limit": "10"}
    places = {"run_file": str(tmp_path / "run.toml"), "out": None, "folder": "/home/me", "programs": "/bin"}
    return Job(name="run", **places, **sizes)


def changed(job, **fields):
    return Job(**{**vars(job), **fields})


def fake_sbatch(tmp_path, monkeypatch, text):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_job_names():
    assert slurm_submit.job_name(Path("a/b c\n.toml")) == "b_c_"
    assert slurm_submit.job_name(Path("fedit-2.toml")) == "fedit-2"


def test_programs_are_those_of_this_environment():
    assert slurm_submit.programs_folder() == str(Path(sys.executable).parent)


def test_a_list_is_words_as_in_a_shell(tmp_path):
    (tmp_path / "list").write_text(
        "# two\n\n  lora.rank_max=8 training.mu=0\n--set 'lora.client_ranks=[4, 8]'\n"
    )
    assert slurm_submit.read_sweep(tmp_path / "list") == (
        ("lora.rank_max=8", "training.mu=0"),
        ("lora.client_ranks=[4, 8]",),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"--array must be a readable text file, got .*No such file"),
        ("# nothing\n", "--array must have a line for each task, got none"),
        ("training.mu=0\n'lora.rank_max=8\n", r"got \"'lora.rank_max=8\" .*line 2: No closing quotation"),
    ],
)
def test_what_is_no_list(tmp_path, text, message):
    if text is not None:
        (tmp_path / "list").write_text(text)
    with pytest.raises(ConfigError, match=message):
        slurm_submit.read_sweep(tmp_path / "list")


def test_a_job_is_checked_with_its_settings(job):
    slurm_submit.check(job)
    with pytest.raises(ConfigError, match=r"got 4 workers .* and 3 clients"):
        slurm_submit.check(changed(job, settings=("federation.num_clients=3",)))
    with pytest.raises(ConfigError, match="did you mean"):
        slurm_submit.check(changed(job, settings=("lora.rank_mx=3",)))


def test_each_task_of_an_array_is_checked(job):
    few = ("federation.num_clients=3",)
    slurm_submit.check(changed(job, settings=few, sweep=(("federation.num_clients=4",),)))
    with pytest.raises(ConfigError, match=r"task 2 of the array \(federation.num_clients=3\): the job's"):
        slurm_submit.check(changed(job, sweep=(("lora.rank_max=8",), few)))


def test_where_to_look(job):
    lines = slurm_submit.describe(job, "12").splitlines()
    assert lines == [
        "job 12: 1 server and 4 workers on 2 nodes",
        "state    squeue --job=12",
        "log      /home/me/run-12.out",
        "results  /home/me/runs/run-12",
    ]
    lines = slurm_submit.describe(changed(job, sweep=((), ()), out="/o"), "12").splitlines()
    assert lines[0] == "job 12, 2 tasks: 1 server and 4 workers on 2 nodes"
    assert lines[2:] == ["log      /home/me/run-12_TASK.out", "results  /o/TASK"]


@pytest.mark.parametrize("answer", ["12", "12;cluster"])
def test_a_script_is_handed_over_as_it_is(tmp_path, monkeypatch, answer):
    fake_sbatch(tmp_path, monkeypatch, f'[ "$*" = --parsable ] && cat >{tmp_path}/got && echo "{answer}"')
    assert slurm_submit.submit_script("#!/bin/sh\ntrue\n") == "12"
    assert (tmp_path / "got").read_text() == "#!/bin/sh\ntrue\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo 'error: invalid partition' >&2; exit 1", "got exit code 1: error: invalid partition; mend"),
        ("echo queued", "got exit code 0: queued; mend"),
    ],
)
def test_a_refusal_has_the_words_of_sbatch(tmp_path, monkeypatch, text, message):
    fake_sbatch(tmp_path, monkeypatch, f"cat >/dev/null; {text}")
    with pytest.raises(ConfigError, match=message):
        slurm_submit.submit_script("")


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch must be on the PATH, got No such file or directory"):
        slurm_submit.submit_script("")
