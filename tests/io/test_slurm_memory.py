from dataclasses import replace

import pytest

from mpifedlora.core.config import RunConfig
from mpifedlora.core.memory_estimate import estimate_memory
from mpifedlora.errors import ConfigError
from mpifedlora.io.model_files import read_model_sizes
from mpifedlora.io.slurm_memory import check_memory, parse_size
from mpifedlora.io.slurm_script import Job, check_job, job_script

JOB = Job(
    name="run",
    run_file="/r.toml",
    out=None,
    folder="/home/me",
    programs="/bin",
    num_nodes=2,
    gpus_per_node=2,
    workers_per_node=4,
    time_limit="10",
)


@pytest.fixture
def config(tiny_model_folder):
    """A run with activations that are larger than all the rest."""
    tables = {"model": {"name": str(tiny_model_folder)}, "data": {"source": "d.csv", "max_length": 64}}
    tables |= {"federation": {"num_clients": 16}, "training": {"batch_size": 20_000}}
    return RunConfig.model_validate(tables)


@pytest.fixture
def estimate(config, tiny_model_folder):
    sizes = read_model_sizes(str(tiny_model_folder), "all-linear")
    return estimate_memory(config, sizes, JOB.num_workers, on_gpu=True)


def megabytes(num_bytes):
    return f"{num_bytes // 2**20}M"


@pytest.mark.parametrize(
    ("text", "expected"), [("3", 3 * 2**20), ("3K", 3072), ("2gB", 2**31), ("1T", 2**40)]
)
def test_sizes(text, expected):
    assert parse_size("--mem", text) == expected


@pytest.mark.parametrize("text", ["", "1.5G", "many", "64G\n", "-1", "1P"])
def test_what_is_no_size(config, text):
    with pytest.raises(ConfigError, match="--mem must be a size such as 64G"):
        parse_size("--mem", text)


def test_a_gpu_holds_its_workers(config, estimate):
    """Two workers share each GPU."""
    least, most = 2 * estimate.gpu.least, 2 * estimate.gpu.total
    fits, tight, small = (megabytes(size) for size in (most + 2**21, most - 2**21, least - 2**21))
    assert len(check_memory(replace(JOB, gpu_memory=fits), config)) == 1
    warning, summary = check_memory(replace(JOB, gpu_memory=tight), config)
    assert warning.startswith("warning: a GPU may need up to")
    assert summary.startswith("memory   the first node ")
    with pytest.raises(ConfigError, match=r"a GPU must have at least .*lower training.batch_size"):
        check_memory(replace(JOB, gpu_memory=small), config)


def test_the_first_node_holds_its_workers_and_the_server(config, estimate):
    least = estimate.least_node_bytes(4, has_server=True)
    with pytest.raises(ConfigError, match="the first node must have at least"):
        check_memory(replace(JOB, memory=megabytes(least - 2**21)), config)
    assert "warning" not in check_memory(replace(JOB, memory="900G"), config)[0]
    assert len(check_memory(replace(JOB, memory="0"), config)) == 1  # all that the node has


def test_an_option_of_sbatch_counts_too(config):
    for option in ("--mem=1G", "--mem 1G"):
        with pytest.raises(ConfigError, match=r"got --mem = 1\.0G"):
            check_memory(replace(JOB, extra=(option,)), config)
    check_memory(replace(JOB, extra=("--mem-bind=local", "--mem=1G", "--mem=900G")), config)


def test_an_unknown_model_is_not_checked(config):
    unknown = config.model_copy(update={"model": config.model.model_copy(update={"name": "owner/name"})})
    assert check_memory(JOB, unknown) == []
    (line,) = check_memory(replace(JOB, memory="1G"), unknown)
    assert line.startswith("memory is not checked: owner/name is no folder")


@pytest.mark.parametrize(
    "option", ["--gres=gpu:2", "--gres=gpu:a100:2", "--gres=nvme:1,gpu:2", "--gpus=4", "-G4", "--gpus=h100:4"]
)
def test_gpus_of_other_options_are_those_of_the_workers(config, option):
    check_job(replace(JOB, extra=(option,)), config)
    for gpus, workers in ((1, 4), (0, 4)):
        with pytest.raises(ConfigError, match="must ask for the GPUs that the workers are counted by"):
            check_job(replace(JOB, gpus_per_node=gpus, workers_per_node=workers, extra=(option,)), config)


def test_other_resources_are_no_gpus(config):
    check_job(replace(JOB, extra=("--gres=nvme:7", "--gpu-bind=none", "--gpu-freq=low")), config)


def test_gpu_memory_is_of_gpus(config):
    with pytest.raises(ConfigError, match="--gpu-memory needs --gpus-per-node of at least 1"):
        check_job(replace(JOB, gpus_per_node=0, gpu_memory="40G"), config)


def test_the_script_asks_for_the_memory():
    assert "#SBATCH --time=10\n#SBATCH --mem=64G\n" in job_script(replace(JOB, memory="64G"))
    assert "--mem" not in job_script(JOB)
