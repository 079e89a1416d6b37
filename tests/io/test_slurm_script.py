import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mpifedlora.core.config import RunConfig
from mpifedlora.errors import ConfigError
from mpifedlora.io.slurm_script import BODY, Job, check_job, count_workers, job_script

ROOT = Path(__file__).parents[2]
JOB = Job(
    name="posts",
    run_file="/data/my posts.toml",
    out=None,
    folder="/home/me",
    programs="/venv/bin",
    num_nodes=2,
    gpus_per_node=4,
    workers_per_node=8,
    time_limit="4:00:00",
)
HEAD = """\
#!/usr/bin/env bash
#SBATCH --job-name=posts
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=9
#SBATCH --gpus-per-node=4
#SBATCH --time=4:00:00
#SBATCH --output=posts-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@120

set -euo pipefail
export PATH=/venv/bin:"$PATH"

run_file='/data/my posts.toml'
out=/home/me/runs/posts-$SLURM_JOB_ID
settings=()
workers_per_node=8
launcher=mpirun

"""


def config(device="auto", **federation):
    tables = {"model": {"name": "minilm"}, "data": {"source": "reuters-r8"}, "training": {"device": device}}
    return RunConfig.model_validate({**tables, "federation": {"num_clients": 16, **federation}})


# The script


def test_the_whole_script():
    assert job_script(JOB) == HEAD + BODY


def test_what_differs_without_gpus_and_with_settings_and_options():
    job = replace(
        JOB,
        gpus_per_node=0,
        out="/big disk/run",
        settings=("lora.rank_max=8", 'lora.target_modules=["query"]'),
        extra=("--mem=64G", "--signal=B:USR2@600"),
        launcher="srun --mpi=pmix",
    )
    lines = job_script(job).splitlines()
    assert "#SBATCH --gpus-per-node" not in " ".join(lines)
    # The last one of an option counts.
    assert lines[8:11] == ["#SBATCH --signal=B:USR2@120", "#SBATCH --mem=64G", "#SBATCH --signal=B:USR2@600"]
    assert "out='/big disk/run'" in lines
    assert "settings=(--set lora.rank_max=8 --set 'lora.target_modules=[\"query\"]')" in lines
    assert "launcher='srun --mpi=pmix'" in lines


def test_an_array_has_its_settings_in_the_script():
    job = replace(JOB, sweep=(("training.mu=0",), ("training.mu=1", "data.source=a b.csv")))
    text = job_script(job)
    assert "#SBATCH --array=1-2\n#SBATCH --output=posts-%A_%a.out\n" in text
    assert "out=/home/me/runs/posts-$SLURM_ARRAY_JOB_ID/$SLURM_ARRAY_TASK_ID\n" in text
    assert "\n    1) settings+=(--set training.mu=0) ;;\n" in text
    assert "\n    2) settings+=(--set training.mu=1 --set 'data.source=a b.csv') ;;\nesac\n" in text
    assert "out=/x/$SLURM_ARRAY_TASK_ID\n" in job_script(replace(job, out="/x"))


def test_the_script_for_everybody_does_the_same():
    assert (ROOT / "slurm/train.sbatch").read_text().endswith("\n\n" + BODY)


@pytest.mark.parametrize("name", ["train", "resume", "sweep", "scaling"])
def test_the_scripts_are_bash(name):
    subprocess.run(["bash", "-n", ROOT / f"slurm/{name}.sbatch"], check=True)


# What does not fit


def test_workers_of_a_node():
    assert count_workers(4, None, None) == 4
    assert count_workers(4, 3, None) == 12
    assert count_workers(0, None, None) == 1
    assert count_workers(0, None, 6) == 6
    with pytest.raises(ConfigError, match="is for nodes without GPUs, got 6 and --gpus-per-node=4"):
        count_workers(4, None, 6)
    with pytest.raises(ConfigError, match="needs --gpus-per-node of at least 1, got 2 and no GPUs"):
        count_workers(0, 2, None)


def test_each_worker_has_a_client_in_each_round():
    check_job(JOB, config())
    with pytest.raises(ConfigError, match=r"got 16 workers \(8 a node\) and 15 clients"):
        check_job(JOB, config(num_clients=15))
    with pytest.raises(ConfigError, match="and 12 clients"):
        check_job(JOB, config(cohort_size=12))
    # Under poisson sampling a round may have all clients.
    check_job(JOB, config(cohort_size=12, sampling="poisson"))


def test_devices_fit():
    check_job(JOB, config("cuda"))
    check_job(replace(JOB, gpus_per_node=0), config("cpu"))
    with pytest.raises(ConfigError, match=r'training.device = "cpu" must fit --gpus-per-node, got 4'):
        check_job(JOB, config("cpu"))
    with pytest.raises(ConfigError, match=r'training.device = "cuda" must fit --gpus-per-node, got 0'):
        check_job(replace(JOB, gpus_per_node=0), config("cuda"))


@pytest.mark.parametrize("limit", ["90", "30:00", "4:00:00", "2-12", "2-12:30", "2-12:30:00"])
def test_time_limits(limit):
    check_job(replace(JOB, time_limit=limit), config())


@pytest.mark.parametrize("limit", ["", "4h", "1:2:3:4", "-1", "1\n#SBATCH --mem=0"])
def test_what_is_no_time_limit(limit):
    with pytest.raises(ConfigError, match="--time must be minutes"):
        check_job(replace(JOB, time_limit=limit), config())


@pytest.mark.parametrize("option", ["mem=64G", "", "--mem=1\nrm x"])
def test_what_is_no_option(option):
    with pytest.raises(ConfigError, match="--sbatch must be one option of sbatch"):
        check_job(replace(JOB, extra=(option,)), config())


@pytest.mark.parametrize("option", ["--nodes=4", "--ntasks 3", "-N4", "-t 3", "--array=1-9", "--output=x"])
def test_options_that_are_computed(option):
    with pytest.raises(ConfigError, match="must not set what `mpifedlora submit` computes"):
        check_job(replace(JOB, extra=(option,)), config())
    check_job(replace(JOB, extra=("--account=me", "-p gpu", "--nodelist=n1")), config())


# What it does, with stand-ins for Slurm and MPI

TOOLS = {
    "mpifedlora": 'if [ "$1" = watch ]; then exit "${SEEN:-0}"; fi',
    "ompi_info": 'echo "FT MPI support: ${FT:-yes}"; exit "${NO_OMPI:-0}"',
    "scontrol": """
echo "scontrol $*" >>"$LOG"
if [ "$1" = show ]; then echo n1; echo n2; else exit "${NO_REQUEUE:-0}"; fi
""",
    "mpirun": """
trap 'echo signalled >>"$LOG"; sleep 0.2; exit "$CODE"' USR2
echo "mpirun $*" >>"$LOG"
for ((tick = 0; tick < ${TICKS:-0}; tick++)); do sleep 0.05; done
exit "$CODE"
""",
}


@pytest.fixture
def stand_ins(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in TOOLS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(folder, **settings):
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    job = replace(JOB, programs=str(folder / "bin"), settings=("training.mu=0",), out="/o")
    script = job_script(replace(job, launcher=settings.pop("launcher", "mpirun")))
    return subprocess.Popen(
        [shutil.which("bash"), "-c", script],
        env={**os.environ, **slurm, "LOG": str(folder / "log"), "CODE": "0", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, folder):
    output, _ = process.communicate(timeout=30)
    return process.returncode, output, (folder / "log").read_text().splitlines()


def test_the_server_stands_on_the_first_node(stand_ins):
    code, output, log = finish(start(stand_ins), stand_ins)
    assert code == 0
    assert output == "== job 7, start 1, on n[1-2]: results in /o\n"
    program = f"{stand_ins}/bin/mpifedlora run /data/my posts.toml --out /o --resume --set training.mu=0"
    hosts = "--host n1:9,n2:8 --bind-to none"
    assert log == ["scontrol show hostnames", f"mpirun -n 17 {hosts} --with-ft ulfm {program}"]


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        ({"FT": "no"}, "mpirun -n 17 --host n1:9,n2:8 --bind-to none /"),
        ({"NO_OMPI": "1"}, "mpirun -n 17 /"),
        ({"launcher": "mpirun --verbose"}, "mpirun --verbose -n 17 /"),
    ],
)
def test_other_launchers(stand_ins, settings, begins):
    _, _, log = finish(start(stand_ins, **settings), stand_ins)
    assert log[-1].startswith(begins)


@pytest.mark.parametrize("code", [1, 2, 137])
def test_failures_are_not_repeated(stand_ins, code):
    found, _, log = finish(start(stand_ins, CODE=str(code)), stand_ins)
    assert found == code
    assert "scontrol requeue 7" not in log


@pytest.mark.parametrize("seen", ["3", "75", "85"])  # as `mpifedlora watch --once` ends
def test_a_launcher_that_says_0_for_an_unfinished_run_is_not_believed(stand_ins, seen):
    found, output, log = finish(start(stand_ins, CODE="0", SEEN=seen), stand_ins)
    assert found == 75
    assert "goes back to the queue" in output
    assert log[-1] == "scontrol requeue 7"


def test_the_signal_is_handed_on_and_the_job_requeued(stand_ins):
    process = start(stand_ins, CODE="85", TICKS="400")
    while not (stand_ins / "log").exists() or "mpirun" not in (stand_ins / "log").read_text():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    code, output, log = finish(process, stand_ins)
    assert code == 85
    assert log[-2:] == ["signalled", "scontrol requeue 7"]
    assert "goes back to the queue" in output


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [("75", "19", True), ("75", "20", False), ("75", "", True), ("85", "400", True)],
)
def test_a_job_that_loses_a_process_at_every_start_ends(stand_ins, code, restarts, again):
    counted = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    found, output, log = finish(start(stand_ins, CODE=code, **counted), stand_ins)
    assert found == int(code)
    assert ("scontrol requeue 7" in log) == again
    assert ("lost a process after 20 restarts, and ends" in output) != again


def test_the_number_of_restarts_is_the_users(stand_ins):
    settings = {"CODE": "75", "SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "2"}
    _, output, log = finish(start(stand_ins, **settings), stand_ins)
    assert "scontrol requeue 7" not in log
    assert output.endswith("after 2 restarts, and ends: see why, and submit it again into /o\n")


def test_a_site_without_requeue(stand_ins):
    code, output, _ = finish(start(stand_ins, CODE="85", NO_REQUEUE="1"), stand_ins)
    assert code == 85
    assert "it cannot: to continue, submit it again into /o" in output


def test_a_sweep_takes_its_line_as_words(stand_ins):
    (stand_ins / "bin" / "activate").write_text(f'PATH="{stand_ins}/bin:$PATH"\n')
    (stand_ins / "list").write_text("training.mu=0\ntraining.mu=1 'data.source=$(touch hacked) b'\n")
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "3", "SLURM_JOB_ID": "8"}
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": str(ROOT)}
    own = {"VENV": str(stand_ins), "LOG": str(stand_ins / "log"), "CODE": "0", "NO_OMPI": "1"}
    command = ["bash", ROOT / "slurm/sweep.sbatch", "r.toml", "o", stand_ins / "list"]
    subprocess.run(command, env={**os.environ, **slurm, **array, **own}, check=True, capture_output=True)
    settings = "--set training.mu=1 --set data.source=$(touch hacked) b"
    run = f"mpirun -n 3 {stand_ins}/bin/mpifedlora run r.toml --out o/2 --resume {settings}"
    assert (stand_ins / "log").read_text().splitlines() == [run]
    assert not (ROOT / "hacked").exists()
