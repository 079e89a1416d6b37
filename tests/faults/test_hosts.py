"""A federation over two hosts, by TCP, and a link that is cut in mid-round."""

import subprocess
from pathlib import Path

import pytest
from faults import hosts as two
from faults import runs, small
from faults.torture import GONE_S, made_whole, waited

from mpifedlora.io.results import read_results
from mpifedlora.transport.base import EXIT_RESUMABLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROGRAM = (str(Path(small.__file__)),)
LIMIT_S = 120  # of a run of some seconds: a hang fails


@pytest.fixture(scope="module")
def hosts():
    reason = two.refusal()
    if reason:
        pytest.skip(reason)
    with two.two_hosts() as made:
        assert waited(made.is_up, GONE_S)
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hosts") / "inputs"
    small.write_inputs(made)
    return made


@pytest.fixture(scope="module")
def whole(folder, hosts):
    return made_whole(folder, "sa-fedlora")


def ended(process):
    """Return exit code and output of a launched run."""
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output


def test_two_hosts_give_the_bits_of_one_process_and_what_is_counted_has_crossed(
    hosts, folder, tmp_path, whole
):
    out, before = tmp_path / "run", hosts.crossed()
    code, output = ended(hosts.launch(PROGRAM, folder, out))
    assert code == 0, output
    assert runs.differing(out, whole) == []
    came, left = (after - then for after, then in zip(hosts.crossed(), before, strict=True))
    rounds = read_results(out / "results.h5").rounds
    assert came >= rounds["uplink_bytes"].sum() > 0
    assert left >= rounds["downlink_bytes"].sum() > 0


def test_a_cut_link_ends_the_run_which_is_resumed_over_the_mended_one(hosts, folder, tmp_path, whole):
    out = tmp_path / "run"
    process = hosts.launch(PROGRAM, folder, out, "faults.worker_timeout_s=3")
    runs.wait_for_rounds(out, process)
    hosts.cut()
    try:
        code, output = ended(process)
        assert code == EXIT_RESUMABLE, output
        assert "has given no sign of life for 3 s; the run ends here; resume it with" in output
        assert waited(lambda: not hosts.process_ids(), GONE_S)
    finally:
        hosts.mend()
    assert runs.num_finished(out) < small.NUM_ROUNDS
    assert waited(hosts.is_up, GONE_S)
    code, output = ended(hosts.launch(PROGRAM, folder, out, options=["--resume"]))
    assert code == 0, output
    assert runs.differing(out, whole) == []
