"""Jobs on a real Slurm: a throw-away cluster of two nodes on this machine (`cluster.sh`)."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import support

from mpifedlora.io.results import read_results

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "tests/slurm/cluster.sh"
DAEMON_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "mpirun")
MISSING = [tool for tool in NEEDED if shutil.which(tool, path=DAEMON_PATH) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"needs {', '.join(MISSING)}: apt-get install slurmctld slurmd slurm-client munge",
    ),
]

NUM_ROUNDS = 8
PACE_S = 6  # of one client; Slurm takes up to 30 s to give a node up, so 8 rounds must take longer
# Those that depend neither on the clock nor on the number of workers.
COLUMNS = ("round_num", "train_loss", "eval_loss", "eval_accuracy", "uplink_bytes", "downlink_bytes")


class Cluster:
    """Slurm's commands against one cluster, from one folder."""

    def __init__(self, folder, work):
        self.folder, self.work = folder, work
        programs = [work / "bin", Path(sys.executable).parent, os.environ["PATH"]]
        self.env = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join(map(str, programs)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "PACE_S": str(PACE_S),
        }

    def __call__(self, *command, check=True):
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.work,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments):
        """Submit the run file; return the job's id and what was printed."""
        command = [sys.executable, "-m", "mpifedlora", "submit", "run.toml", *arguments]
        printed = self(*command)
        return re.match(r"job (\d+)", printed)[1], printed

    def submit_paced(self, *arguments):
        """Submit the run with `paced.py` in the place of mpifedlora; return the job's id."""
        script = self(sys.executable, "-m", "mpifedlora", "submit", "run.toml", *arguments, "--dry-run")
        own = Path(sys.executable).parent
        assert f"export PATH={own}:" in script
        file = self.work / "paced.sbatch"
        file.write_text(script.replace(f"export PATH={own}:", f"export PATH={self.work / 'bin'}:{own}:"))
        return self("sbatch", "--parsable", file).strip()

    def fields(self, job):
        """All of what Slurm knows of a job, as a dictionary."""
        words = self("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, job, seconds=300):
        """Wait for a job's end; return its fields and its log."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        for _ in range(4 * seconds):
            fields = self.fields(job)
            if fields["JobState"] in ended:
                return fields, self.log(fields)
            time.sleep(0.25)
        pytest.fail(f"job {job} must end within {seconds} s, got {fields}:\n{self.log(fields)}")

    @staticmethod
    def log(fields):
        file = Path(fields["StdOut"])
        return file.read_text() if file.exists() else "(no log)"

    def wait_for_round(self, out, job, seconds=200):
        """Wait until a run's first round is on disk."""
        for _ in range(5 * seconds):
            if (out / "results.h5").exists():
                with h5py.File(out / "results.h5") as file:
                    if len(file["rounds/round_num"]):
                        return
            time.sleep(0.2)
        fields = self.fields(job)
        pytest.fail(f"job {job} must finish a round within {seconds} s, got {fields}:\n{self.log(fields)}")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    support.make_run_file(folder, f"[federation]\nnum_clients = 2\nnum_rounds = {NUM_ROUNDS}\n")
    (folder / "bin").mkdir()
    program = folder / "bin" / "mpifedlora"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests/slurm/paced.py"} "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def cluster(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("throwaway") / "cluster"
    subprocess.run([CLUSTER, "start", folder], check=True, timeout=60)
    try:
        yield Cluster(folder, work)
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True, timeout=60)
        assert not folder.exists()


@pytest.fixture(scope="module")
def limited(cluster):
    """A job that meets its time limit: Slurm looks every 30 s, so it is asked to stop after 20 to 50 s."""
    sizes = ("--workers-per-node", "1", "--time", "3", "--out", "limited")
    return cluster.submit_paced(*sizes, "--sbatch=--signal=B:USR2@130", "--sbatch=--nodelist=n1")


@pytest.fixture(scope="module")
def uninterrupted(cluster, limited, work):
    """The results of the same run, in one process."""
    command = [sys.executable, "-m", "mpifedlora", "run", "run.toml", "--out", "reference"]
    cluster(*command)
    return outcome(work / "reference")


def outcome(out):
    results = read_results(out / "results.h5")
    assert results.status == "finished"
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    return adapter, {name: results.rounds[name] for name in COLUMNS}


def check_equal(found, expected):
    for name in COLUMNS:
        np.testing.assert_array_equal(found[1][name], expected[1][name], err_msg=name)
    assert found[0] == expected[0]


def rounds_of(log):
    return [int(number) for number in re.findall(rf"^round +(\d+)/{NUM_ROUNDS} ", log, re.MULTILINE)]


def test_a_job_finishes_on_nodes_that_are_drained_meanwhile(cluster, work, uninterrupted):
    job, printed = cluster.submit("--nodes", "2", "--workers-per-node", "1", "--time", "10")
    out = work / "runs" / f"run-{job}"
    assert printed.splitlines() == [
        f"job {job}: 1 server and 2 workers on 2 nodes",
        f"state    squeue --job={job}",
        f"log      {work}/run-{job}.out",
        f"results  {out}",
    ]
    while cluster.fields(job)["JobState"] == "PENDING":
        time.sleep(0.2)
    cluster("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    fields, log = cluster.wait(job)
    cluster("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("COMPLETED", "0:0", "0"), log
    assert fields["NodeList"] == "n[1-2]"
    assert "2 clients on 2 workers" in log
    assert f"round {NUM_ROUNDS}/{NUM_ROUNDS}" in log
    check_equal(outcome(out), uninterrupted)


def test_an_array_of_three(cluster, work, limited):
    (work / "list").write_text(
        "# learning rates\nfederation.num_rounds=1\n"
        "federation.method=fedit federation.num_rounds=2\n'federation.num_rounds=3'\n"
    )
    sizes = ("--workers-per-node", "1", "--time", "10", "--array", "list", "--out", "sweep")
    job, printed = cluster.submit(*sizes, "--set", "initiating.rounds=0")
    assert f"job {job}, 3 tasks: 1 server and 1 workers on 1 nodes" in printed
    for task in (1, 2, 3):
        fields, log = cluster.wait(f"{job}_{task}")
        assert (fields["JobState"], fields["StdOut"]) == ("COMPLETED", f"{work}/run-{job}_{task}.out"), log
        rounds = read_results(work / "sweep" / str(task) / "results.h5").rounds
        assert len(rounds["round_num"]) == task
    assert 'method = "fedit"' in (work / "sweep/2/run.toml").read_text()
    assert 'method = "sa-fedlora"' in (work / "sweep/3/run.toml").read_text()


def test_tasks_of_srun_that_do_not_see_each_other_are_refused(cluster, work, limited):
    sizes = ("--nodes", "2", "--workers-per-node", "1", "--time", "10", "--out", "alone")
    job, _ = cluster.submit(*sizes, "--launcher", "srun --mpi=none")
    fields, log = cluster.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert log.count("must form one MPI job") == 1
    assert not (work / "alone").exists()


def test_a_node_that_is_lost_sends_the_job_back_and_it_continues(cluster, work, uninterrupted):
    job = cluster.submit_paced("--nodes", "2", "--workers-per-node", "1", "--time", "10", "--out", "lost")
    cluster.wait_for_round(work / "lost", job)
    os.kill(int((cluster.folder / "slurmd-n2.pid").read_text()), signal.SIGKILL)
    for _ in range(300):
        if cluster.fields(job)["Restarts"] == "1":
            break
        time.sleep(0.2)
    cluster(CLUSTER, "node", "2", cluster.folder)
    # Slurm lets such a job wait for two minutes: late messages of its first start do no harm then.
    fields, log = cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert rounds_of(log).count(1) == 1, log
    check_equal(outcome(work / "lost"), uninterrupted)


def test_at_the_time_limit_a_job_goes_back_and_continues(cluster, work, limited, uninterrupted):
    fields, log = cluster.wait(limited)
    assert fields["JobState"] == "COMPLETED", log
    assert int(fields["Restarts"]) >= 1
    assert f"== job {limited} goes back to the queue" in log
    assert f"== job {limited}, start 2" in log
    assert rounds_of(log) == list(range(1, NUM_ROUNDS + 1)), log
    check_equal(outcome(work / "limited"), uninterrupted)
