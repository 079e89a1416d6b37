"""Run the study, and go on with it after an interruption.

    python benchmarks/study/run.py                    # all of it
    python benchmarks/study/run.py --list             # what is left, without running it
    python benchmarks/study/run.py --quick            # every arm for two rounds, as a check; minutes
    python benchmarks/study/run.py --stage core       # or search, tuning, local, factors, small, ablations
    python benchmarks/study/run.py --adopt runs/a     # take in runs that were made elsewhere

Each run is one process with one thread and its own run file, benchmarks/study/runs/SETTING/ARM.toml, which
has the learning rate that the tuning chose. Results go to benchmarks/study/results; what they hold already
is not run again. All of it takes some 32 hours of one core; `tables.py` makes tables and figures of
whatever there is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
from design import (
    ARMS,
    LANGUAGE_MODEL,
    LOCAL,
    LOCAL_SEED,
    SETTINGS,
    TUNED,
    VIT,
    Rates,
    Trial,
    ablations,
    arms_of,
    client_file,
    core,
    factors,
    local,
    search,
    small,
    tuning,
)
from records import RESULTS, Records, chosen_rates, record, tables_of, trial_of, write_run_file

from mpifedlora.core.partition import partition
from mpifedlora.io.datasets import read_dataset
from mpifedlora.io.results import read_results
from mpifedlora.io.run_file import resolve_run

RUN_FILES = Path(__file__).parent / "runs"
VARIANTS = Path(__file__).parent / "variants.py"
ROOT = Path(__file__).parents[2]
LOCAL_ARMS = [arm.name for arm in LOCAL]
STAGES = ("search", "tuning", "core", "local", "factors", "small", "ablations")
QUICK = {"federation.num_rounds": 2, "training.local_steps": 1, "evaluation.max_examples": 64,
         "initiating.rounds": 1, "annealing.heating_rounds": 0}  # fmt: skip
# glibc would give every large gradient back to the system and fetch zeroed pages for the next.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "9000000000", "MALLOC_TOP_PAD_": "268435456"}


def trials_of(stage: str, rates: Rates) -> list[Trial]:
    """Return a stage's runs in order."""
    fixed = {"search": search, "tuning": tuning}
    chosen = {"core": core, "local": local, "factors": factors, "small": small, "ablations": ablations}
    return list(fixed[stage]() if stage in fixed else chosen[stage](rates))


def write_run_files(rates: Rates) -> None:
    """Write the run file of every arm in every setting that it is run in, at seed 0 and on the test part."""
    stale = set(RUN_FILES.rglob("*.toml"))
    for setting in SETTINGS:
        for arm in arms_of(setting):
            trial = Trial(setting, arm.name, rates[setting, arm.name], 0, "test")
            head = f"{arm.about}, on {setting}. Written by benchmarks/study/run.py from design.py."
            if arm.variant:
                head += f"\nIts runs need a change of the package: variants.py {arm.variant} run THIS FILE."
            file = RUN_FILES / setting / f"{arm.name}.toml"
            write_run_file(file, tables_of(trial), head)
            stale.discard(file)
    for file in stale:
        file.unlink()


def write_client_files(setting: str) -> None:
    """Write what each client of a federation trains on into a file of its own."""
    config = resolve_run(tables_of(Trial(setting, "fedavg", 1e-4, LOCAL_SEED, "test")), {}).config
    data = read_dataset(
        config.data.source, validation_fraction=config.data.validation_fraction, seed=LOCAL_SEED
    )
    num_clients, alpha = config.federation.num_clients, config.data.alpha
    parts = partition("dirichlet", data.train.labels, num_clients, LOCAL_SEED, alpha=alpha)
    for client_id, part in enumerate(parts):
        examples = data.train.take(part)
        rows = zip(examples.texts, examples.labels, strict=True)
        file = ROOT / client_file(setting, client_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text, "label": data.label_names[label]}) for text, label in rows]
        fresh = file.with_suffix(f".{os.getpid()}")  # another process may read or write it now
        fresh.write_text("\n".join(lines) + "\n")
        fresh.replace(file)


def write_models() -> None:
    """Write the small models of random weights, and the instructions, where they are missing."""
    for script, folder in (("make_tiny_vit.py", VIT), ("make_tiny_lm.py", LANGUAGE_MODEL)):
        if not (ROOT / folder).exists():
            subprocess.run([sys.executable, f"examples/{script}", folder], cwd=ROOT, check=True)


def run_trial(trial: Trial, out: Path, quick: bool) -> tuple[Path, float]:
    """Run a trial, and return its folder and processor time in seconds."""
    folder = out.resolve() / trial.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = RUN_FILES / trial.setting / f"{trial.arm}.toml"
    sets = trial.overrides() | (QUICK if quick else {})
    variant = ARMS[trial.arm].variant
    program = [str(VARIANTS), variant] if variant else ["-m", "mpifedlora"]
    command = [sys.executable, *program, "run", str(file), "--out", str(folder), "--overwrite"]
    command += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    with Path(f"{folder}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**MALLOC, **os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{trial.name} ended with {process.returncode}: see {folder}.log")
    return folder, usage.ru_utime + usage.ru_stime


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def _adopt(records: Records, folders: Iterable[Path], commit: str) -> None:
    for folder in folders:
        results = read_results(folder)
        trial = trial_of(results)
        if trial is None or results.status != "finished":
            click.echo(f"{folder}: no finished run of the design")
            continue
        records.add(*record(trial, results, float("nan"), commit))
        click.echo(f"{folder}: {trial.name}")


@click.command(help=__doc__)
@click.option("--stage", type=click.Choice(STAGES), multiple=True, help="Only these stages.")
@click.option("--only", multiple=True, help="Only runs whose name contains this text, or another --only.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="Runs at a time, a core each.")
@click.option("--quick", is_flag=True, help="Every arm for two rounds, kept apart: a check, no measurement.")
@click.option("--list", "is_list", is_flag=True, help="Show what is left, and run nothing.")
@click.option(
    "--adopt", type=click.Path(path_type=Path, exists=True), multiple=True, help="Folder of a run to take in."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/study"), show_default=True)
def main(
    stage: tuple[str, ...],
    only: tuple[str, ...],
    jobs: int,
    quick: bool,
    is_list: bool,
    adopt: tuple[Path, ...],
    out: Path,
) -> None:
    """Run what is left of the study."""
    out = out / "quick" if quick else out
    records = Records(out / "results" if quick else RESULTS)
    _adopt(records, adopt, _commit())
    for name in [] if adopt else stage or STAGES:
        rates = chosen_rates(Records())
        write_run_files(rates)
        trials = [
            trial for trial in trials_of(name, rates) if not only or any(text in trial.name for text in only)
        ]
        if quick:
            trials = list({replace(trial, seed=0, rate=ARMS[trial.arm].rates[0]): None for trial in trials})
        left = [trial for trial in trials if quick or not records.has(trial)]
        click.echo(f"{name}: {len(trials) - len(left)} of {len(trials)} runs are there")
        if not is_list and any(trial.arm in LOCAL_ARMS for trial in left):
            for setting in TUNED:
                write_client_files(setting)
        if not is_list and any(trial.arm.startswith("small") for trial in left):
            write_models()
        if is_list:
            click.echo("".join(f"  {trial.name}\n" for trial in left), nl=False)
        else:
            _run_all(left, out, jobs, quick, records)


def _run_all(trials: list[Trial], out: Path, jobs: int, quick: bool, records: Records) -> None:
    lock, commit = threading.Lock(), _commit()

    def one(trial: Trial) -> None:
        folder, cpu_s = run_trial(trial, out, quick)
        with lock:
            kept, points = record(trial, read_results(folder), cpu_s, commit)
            records.add(kept, points)
            click.echo(f"{trial.name}: accuracy {kept.accuracy:.4f}, loss {kept.loss:.4f}, {cpu_s:.0f} s")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, trials))


if __name__ == "__main__":
    main()
