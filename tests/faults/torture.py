"""Random faults at random times: `make torture`, or `python tests/faults/torture.py --runs 100 --seed 0`.

A run of four rounds on a server and three workers is hit once, while it starts, trains, sends, measures or
saves. It must end by itself; if it has not finished it is resumed, and must leave what a run in one piece
leaves, to the last bit.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import support
from faults.runs import LONG, begin, differing, end, processes_of, send

from mpifedlora.runtime import launch

NUM_PROCESSES, TIMEOUT_S = 4, 4
LONGEST_S = 90  # to end by itself, with whatever else the machine does
FAULTS = (
    "worker killed",
    "two workers killed",
    "all workers killed",
    "server killed",
    "mpirun killed",
    "worker stopped",
    "server stopped",
    "mpirun: SIGUSR2",
    "mpirun: SIGTERM",
)


class Outcome(NamedTuple):
    """How a run has taken a fault.

    Args:
        fault: what was done.
        after_s: after the run had begun its first round.
        survived: whether it finished by itself.
        resumed: whether a resumed run finished exactly.
        hung: whether it did not end.
        lost: what was not there, or not exact, in the end.
    """

    fault: str
    after_s: float
    survived: bool
    resumed: bool
    hung: bool
    lost: str


def torture(folder, out, whole, seed):
    """Hit one run, and resume it if need be.

    Args:
        folder: of the run file.
        out: of the run.
        whole: of the same run in one piece.
        seed: what is done, and when; all faults come in turn.
    """
    fault, after_s = FAULTS[seed % len(FAULTS)], random.Random(seed).uniform(0, 4)
    process = begin(folder, out, f"faults.worker_timeout_s={TIMEOUT_S}", processes=NUM_PROCESSES)
    while process.poll() is None and not (out / "results.h5").exists():
        time.sleep(0.02)
    time.sleep(after_s)
    hit(fault, process, processes_of(out), random.Random(seed))
    try:
        process.communicate(timeout=LONGEST_S)
        hung = not all_ended(out)
    except subprocess.TimeoutExpired:
        hung = True
    end(out)
    process.kill()
    process.communicate()
    if process.returncode == 0:
        return Outcome(fault, after_s, True, False, hung, told(differing(out, whole)))
    again = begin(folder, out, resumes=True)
    try:
        text, _ = again.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        end(out)
        return Outcome(fault, after_s, False, False, True, "")
    lost = told(differing(out, whole)) if again.returncode == 0 else text[-2000:]
    return Outcome(fault, after_s, False, not lost, hung, lost)


def told(keys):
    """Return differing keys as one text."""
    return ", ".join(keys)


def all_ended(out):
    """Wait up to 10 s for what is left of a job whose launcher has ended; stopped processes do not count."""
    deadline = time.monotonic() + 10
    while any(not is_stopped(process_id) for process_id in processes_of(out).values()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def is_stopped(process_id):
    """Say whether a process is stopped, and so cannot end, or has ended."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(") ")[2][0] in "TZ"
    except OSError:
        return True


def hit(fault, process, ids, chance):
    """Do what a fault says."""
    who, _, what = fault.partition(" ")
    if who in ("mpirun", "mpirun:"):
        process.send_signal({"killed": signal.SIGKILL}.get(what) or getattr(signal, what))
        return
    workers = [mpi_rank for mpi_rank in ids if mpi_rank]
    count = {"worker": 1, "two": 2, "all": len(workers), "server": 0}[who]
    chosen = chance.sample(workers, min(count, len(workers))) if count else [0]
    for mpi_rank in chosen:
        if mpi_rank in ids:
            send(ids[mpi_rank], signal.SIGSTOP if what.endswith("stopped") else signal.SIGKILL)


def main():
    """Print what came of many faults; exit with 1 if anything hung or was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=108)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=3600, help="no run begins after so many seconds")
    options = parser.parse_args()
    folder, started, outcomes = Path(tempfile.mkdtemp(prefix="torture-")), time.monotonic(), []
    support.make_run_file(folder)
    assert launch.run(folder / "run.toml", [LONG], folder / "whole", False) == 0
    for seed in range(options.seed, options.seed + options.runs):
        if time.monotonic() - started > options.limit_s:
            break
        outcome = torture(folder, folder / f"run-{seed}", folder / "whole", seed)
        outcomes.append(outcome)
        verdict = "survived" if outcome.survived else "resumed exactly" if outcome.resumed else "not resumed"
        print(f"{seed:4d}  {outcome.fault:18s} after {outcome.after_s:4.1f} s  {verdict}", flush=True)
        if outcome.hung or outcome.lost:
            print(f"      hung: {outcome.hung}, lost: {outcome.lost or 'nothing'}", flush=True)
    hangs, losses = sum(one.hung for one in outcomes), sum(bool(one.lost) for one in outcomes)
    print(f"runs                {len(outcomes)}")
    print(f"survived            {sum(one.survived for one in outcomes)}")
    print(f"resumed exactly     {sum(one.resumed for one in outcomes)}")
    print(f"hangs               {hangs}")
    print(f"results lost        {losses}")
    return int(bool(hangs or losses))


if __name__ == "__main__":
    sys.exit(main())
