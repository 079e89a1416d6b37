"""Random faults at random times: `make torture`, or `PYTHONPATH=tests python -m faults.torture --runs 100`.

A federation of a server and two or three workers (`small.py`) is started and hit: in a phase of one of its
processes, in a round, and after a delay that all come from a seed. It must end by itself. If it has not
finished it is resumed and hit again, up to four times, and then left alone: it must leave what a run in one
piece leaves, to the last bit. What was saved may never become less.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from faults import runs, small

from mpifedlora.errors import MpiFedLoraError
from mpifedlora.io.checkpoints import CheckpointStore
from mpifedlora.io.results import read_results

MOST_HITS, TIMEOUT_S = 4, 4.0
# Counted in waits, so that a machine that stands still does not look like a hang.
POLL_S, LONGEST_S, GONE_S = 0.05, 300.0, 60.0
AT_WORKER = ("start", "connect", "set-up", "broadcast", "train", "collect", "any")
AT_SERVER = (
    "start",
    "connect",
    "set-up",
    "broadcast",
    "collect",
    "measure",
    "results",
    "checkpoint",
    "export",
    "end",
    "any",
)
FAULTS = {
    "worker killed": AT_WORKER,
    "all workers killed": AT_WORKER,
    "worker stopped": AT_WORKER[3:],
    "worker paused": AT_WORKER,
    "server killed": AT_SERVER,
    "server stopped": (
        "broadcast",
        "collect",
        "measure",
        "results",
        "export",
    ),  # later nobody is left to notice
    "server paused": AT_SERVER,
    "mpirun killed": AT_SERVER,
    "mpirun: SIGTERM": AT_SERVER,
    "mpirun: SIGUSR2": AT_SERVER[1:],  # before Python runs it kills a process, as any signal does
}
SURVIVED_BY_DESIGN = {"worker killed": ("broadcast", "train", "collect"), "worker paused": AT_WORKER}
METHODS = {
    "sa-fedlora": (),
    "fedsa-lora": ("federation.method=fedsa-lora", "federation.cohort_size=2", "evaluation.on=workers"),
    "scaffold": (
        "federation.method=custom",
        "federation.cohort_size=2",
        "training.control_variates=true",
        "training.optimizer=sgd",
        "aggregation.kind=factors",
        "initiating.mu=0",
    ),
    "residual": ("federation.method=custom", "aggregation.kind=residual"),
}


class Fault(NamedTuple):
    """What is done, when its victim is in this phase, after so many rounds and then so many seconds."""

    what: str
    phase: str
    after_rounds: int
    delay_s: float


@dataclass
class Tally:
    """What came of all faults."""

    hits: Counter = field(default_factory=Counter)  # by fault and the phase that it met
    endings: Counter = field(default_factory=Counter)  # by fault and exit code
    runs: int = 0
    survived: int = 0
    resumed: int = 0
    unresumed: int = 0
    hangs: int = 0
    losses: int = 0
    broken: int = 0  # by a fault that should be survived

    def is_good(self):
        return not (self.hangs or self.losses or self.broken or self.unresumed)

    def lines(self):
        faults, phases = Counter(), Counter()
        for (what, phase), count in self.hits.items():
            faults[what] += count
            phases[phase] += count
        yield f"runs                {self.runs}"
        yield f"faults injected     {self.hits.total()}"
        yield from (f"  {what:<18s} {count}" for what, count in sorted(faults.items()))
        yield "  in phases         " + ", ".join(f"{name} {count}" for name, count in phases.most_common())
        yield f"survived            {self.survived}"
        yield f"ended, and resumed exactly  {self.resumed}"
        yield f"not resumed exactly  {self.unresumed}  (must be 0)"
        yield f"hangs               {self.hangs}  (must be 0)"
        yield f"results or checkpoints lost  {self.losses}  (must be 0)"
        yield f"ended where a worker's loss is survived  {self.broken}  (must be 0)"
        codes = Counter()
        for (_, code), count in self.endings.items():
            codes[code] += count
        yield "exit codes          " + ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))


class Federation:
    """One federation: hit, resumed, hit again, compared.

    Args:
        folder: of the run file.
        name: of its own folder.
        seed: all that happens comes from it, but how long the machine takes.
        tally: where to count.
    """

    def __init__(self, folder, name, seed, tally):
        self.folder, self.out, self.tally = folder, folder / name, tally
        self.random = random.Random(f"federation {seed}")
        self.method = list(METHODS)[seed % len(METHODS)]
        self.launches = 0
        self.waiting = 0  # runs that ended and wait to be shown resumable

    def play(self, whole, is_over):
        """Hit it until it has finished, then compare it with the same federation in one piece."""
        for number in range(MOST_HITS + 1):
            is_last = number == MOST_HITS or is_over()
            faults = [] if is_last else self.faults()
            code, text = self.run(faults)
            if code == 0:
                break
        else:
            return self.fail("unresumed", f"exit code {code}\n{text[-3000:]}")
        differing = runs.differing(self.out, whole)
        if differing:
            return self.fail("unresumed", f"differing: {differing[:8]}")
        self.tally.resumed += self.waiting

    def fail(self, name, text):
        setattr(self.tally, name, getattr(self.tally, name) + 1)
        print(f"!! {name}: {self.out.name}: {text}", flush=True)

    def faults(self):
        chance = self.random
        chosen = chance.choices(list(FAULTS), k=2 if chance.random() < 0.25 else 1)
        return [
            Fault(what, chance.choice(FAULTS[what]), chance.randrange(3), chance.uniform(0, small.PACE_S))
            for what in chosen
        ]

    def run(self, faults):
        """Start or resume it, hit it, and wait until it ends; return exit code and output."""
        before, begun = saved(self.out), time.monotonic()
        may_be_silent = any(fault.what.endswith("stopped") for fault in faults)
        settings = [*METHODS[self.method], f"faults.worker_timeout_s={TIMEOUT_S if may_be_silent else 120}"]
        self.launches += 1
        log = self.folder / f"{self.out.name}.{self.launches}.log"
        with log.open("w") as output:
            program = (str(Path(small.__file__)),)
            processes = 1 + self.random.choice((2, 2, 3))
            process = runs.launch(program, self.folder, self.out, settings, processes, output, "--resume")
            job = Job(process, self.out, processes)
            met = [found for fault in faults if (found := job.hit(fault, before.round_num, self.random))]
            has_ended = job.ends()
        text = log.read_text(errors="replace")
        self.count(met, process.returncode, has_ended, time.monotonic() - begun, text)
        self.check_saved(before, met)
        return process.returncode, text

    def count(self, met, code, has_ended, seconds, text):
        tally = self.tally
        told = "; ".join(f"{what} in {phase}" for what, phase in met) or "left alone"
        print(f"{self.out.name:>5s} {self.method:<11s}{told:<48s} exit {code}  {seconds:5.1f} s", flush=True)
        if not has_ended:
            self.fail("hangs", f"{told}\n{text[-3000:]}")
        if not met:
            return
        tally.runs += 1
        tally.hits.update(met)
        tally.endings.update((what, code) for what, _ in met[:1])
        if code == 0:
            tally.survived += 1
        else:
            self.waiting += 1
            if len(met) == 1 and met[0][1] in SURVIVED_BY_DESIGN.get(met[0][0], ()):
                self.fail("broken", f"{told}: exit code {code}\n{text[-3000:]}")

    def check_saved(self, before, met):
        after = saved(self.out)
        if after.error or after.round_num < before.round_num or after.num_rows < after.round_num:
            self.fail("losses", f"{met}: {before} and then {after}")


class Saved(NamedTuple):
    """The last whole checkpoint's round, the rows of the results, and what is wrong with either."""

    round_num: int
    num_rows: int
    error: str = ""


def saved(out):
    """Return what a folder holds; damage is an error, since nothing here damages a file."""
    damage = []
    try:
        found = CheckpointStore(out / "checkpoints", 9).latest(damage.append)
        path = out / "results.h5"
        num_rows = len(read_results(path).rounds["round_num"]) if path.exists() else 0
    except MpiFedLoraError as error:
        return Saved(0, 0, str(error))
    return Saved(found.round_num if found else 0, num_rows, "; ".join(damage))


class Job:
    """A launched run: the phases of its processes, and its end."""

    def __init__(self, process, out, size):
        self.process, self.out, self.size = process, out, size
        self.ids = {}

    def find(self):
        """Look for the processes, until all are there."""
        if len(self.ids) < self.size:
            self.ids |= runs.processes_of(self.out)
        return self.ids

    def hit(self, fault, base, chance):
        """Wait for the moment, and do it; return what was met, or None if the run had ended before."""
        mpi_rank = chance.randrange(1, self.size) if fault.what.startswith("worker") else 0
        victim = 1 if fault.what.startswith("all") else mpi_rank
        for _ in range(int(LONGEST_S / 0.005)):
            if self.process.poll() is not None:
                return None
            if self.is_time(fault, base) and self.is_in(victim, fault.phase):
                break
            time.sleep(0.005)
        time.sleep(fault.delay_s)
        ids = {number: pid for number, pid in self.find().items() if not is_stopped(pid)}
        met = [name for name in phases(ids.get(victim)) if name in small.PHASES]
        if not met or self.process.poll() is not None:
            return None
        self.do(fault.what, mpi_rank, ids)
        return fault.what, fault.phase if fault.phase in met else met[0]

    def is_time(self, fault, base):
        """Say whether so many rounds are saved; what comes before or after all rounds waits for none."""
        if fault.phase in ("start", "connect", "set-up", "export", "end"):
            return True
        names = [path.name for path in (self.out / "checkpoints").glob("round-*.safetensors")]
        last = max((int(name[6:11]) for name in names), default=0)
        return last >= min(base + fault.after_rounds, small.NUM_ROUNDS - 1)

    def is_in(self, victim, phase):
        """Say whether a process is in a phase; `any` is any after the set-up."""
        ids = self.find()
        if victim not in ids:
            return False
        wanted = small.PHASES[3:] if phase == "any" else [phase]
        return any(name in wanted for name in phases(ids[victim]))

    def do(self, what, mpi_rank, ids):
        who, _, how = what.partition(" ")
        if who.startswith("mpirun"):
            number = {"killed": signal.SIGKILL}.get(how) or getattr(signal, how)
            self.process.send_signal(number)
        elif who == "all":
            for other in sorted(set(ids) - {0}):
                runs.send(ids[other], signal.SIGKILL)
        else:
            runs.send(ids[mpi_rank], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            if how == "paused":
                time.sleep(1.0)
                runs.send(ids[mpi_rank], signal.SIGCONT)

    def ends(self):
        """Return whether launcher and processes have ended by themselves; end what is left."""
        has_ended = waited(lambda: self.process.poll() is not None, LONGEST_S)
        # What is stopped cannot end: it goes with its launcher, or with the job's next start.
        gone = has_ended and waited(
            lambda: all(is_stopped(pid) for pid in runs.processes_of(self.out).values()), GONE_S
        )
        runs.end(self.out)
        self.process.kill()
        self.process.wait()
        return gone


def waited(is_so, longest_s):
    """Wait for something, for so many seconds of an undisturbed machine; return whether it came."""
    for _ in range(int(longest_s / POLL_S)):
        if is_so():
            return True
        time.sleep(POLL_S)
    return False


def phases(pid):
    """Return what a process does: what its main thread does, and whether another writes a checkpoint."""
    found = []
    with suppress(OSError):
        found.append(Path(f"/proc/{pid}/comm").read_text().strip())
        names = [file.read_text().strip() for file in Path(f"/proc/{pid}/task").glob("*/comm")]
        found += {"checkpoint"} & set(names)
    return found


def is_stopped(pid):
    """Say whether a process is stopped, and so cannot end, or has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "TZ"
    except OSError:
        return True


def made_whole(folder, method):
    """Run a federation in one piece, in one process; return its folder."""
    out = folder / f"whole-{method}"
    command = [sys.executable, small.__file__, "run", str(folder / "run.toml"), "--out", str(out)]
    command += [part for setting in METHODS[method] for part in ("--set", setting)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return out


def torture(folder, num_runs, seed, jobs=1, limit_s=3600.0):
    """Hit federations until so many runs were hit.

    Args:
        folder: for everything; it must not exist.
        num_runs: that are hit.
        seed: of all that is random.
        jobs: federations at a time.
        limit_s: no federation begins, and none is hit, after so many seconds.
    """
    small.write_inputs(folder)
    tally, started = Tally(), time.monotonic()
    whole = {method: made_whole(folder, method) for method in list(METHODS)[: max(2, num_runs // 5)]}

    def is_over():
        return tally.runs >= num_runs or time.monotonic() - started > limit_s

    def one_after_another(first):
        number = first
        while not is_over():
            one = Federation(folder, f"{number:04d}", seed * 10_000 + number, tally)
            if one.method in whole:
                one.play(whole[one.method], is_over)
            number += jobs

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one_after_another, range(jobs)))
    return tally


def main():
    """Print what came of many faults; exit with 1 if anything hung or was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="federations at a time")
    parser.add_argument("--limit-s", type=float, default=3600, help="nothing is hit after so many seconds")
    options = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="torture-")) / "runs"
    tally = torture(folder, options.runs, options.seed, options.jobs, options.limit_s)
    print(f"seed {options.seed}, {time.monotonic() - started:.0f} s")
    print(*tally.lines(), sep="\n")
    return int(not tally.is_good())


if __name__ == "__main__":
    sys.exit(main())
