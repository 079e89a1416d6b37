"""Compare freeze, drop, fixed rank at equal bytes and FedAvg on one run file, each at its own learning rate.

    python benchmarks/compare_methods.py --out runs/compare --csv benchmarks/results/compare_methods.csv

First every method runs with each learning rate of its grid on one seed, measured on the validation
part (held out of the training data). Then it runs with the best of them on every seed, measured on
the test part. Finished runs are not run again, so the command can be stopped and given again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from mpifedlora.errors import CheckpointError
from mpifedlora.io.compare import write_csv
from mpifedlora.io.results import Results, read_results

ADAPTER_RATES = (2e-3, 4e-3)
FULL_RATES = (3e-4, 1e-3)


@dataclass(frozen=True)
class Method:
    """A method under comparison: what it sets, and the learning rates it may choose from."""

    settings: Mapping[str, str]
    rate_key: str = "training.learning_rate"
    rates: tuple[float, ...] = ADAPTER_RATES


METHODS = {
    "freeze": Method({"annealing.cut": "freeze"}),
    "drop": Method({"annealing.cut": "drop"}),
    "fixed rank": Method({"federation.method": "fedit"}),
    "fedavg": Method({"federation.method": "fedavg"}, "training.full_learning_rate", FULL_RATES),
}


@dataclass(frozen=True)
class Trial:
    """One run: a method, a learning rate, a seed, and the part it is measured on."""

    method: str
    rate: float
    seed: int
    split: str

    def folder(self, out: Path) -> Path:
        """Return where its results lie."""
        return out / f"{self.method.replace(' ', '-')}-{self.rate:g}-{self.seed}-{self.split}"


def run_trial(trial: Trial, run_file: str, common: Sequence[str], out: Path) -> Results:
    """Run a trial in one process with one thread, unless it has finished before."""
    method = METHODS[trial.method]
    values = {
        **method.settings,
        method.rate_key: f"{trial.rate:g}",
        "federation.seed": str(trial.seed),
        "evaluation.split": trial.split,
        "training.threads": "1",
    }
    return run_once(trial.folder(out), run_file, [*common, *assignments(values)])


def run_once(folder: Path, run_file: str, settings: Sequence[str], launcher: Sequence[str] = ()) -> Results:
    """Run into a folder, with the log beside it, unless a finished run lies there.

    Args:
        folder: of the run; what an unfinished run has left in it is overwritten.
        run_file: TOML file.
        settings: each `section.key=value`.
        launcher: words before the command, such as those of mpirun; none for one process.
    """
    done = _finished(folder)
    if done:
        return done
    command = [*launcher, sys.executable, "-m", "mpifedlora", "run", run_file]
    command += ["--out", str(folder), "--overwrite"]
    command += [part for setting in settings for part in ("--set", setting)]
    with Path(f"{folder}.log").open("w") as stream:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)
    return read_results(folder / "results.h5")


def assignments(values: Mapping[str, str]) -> list[str]:
    """Return `section.key=value` for each key."""
    return [f"{key}={value}" for key, value in values.items()]


def _finished(folder: Path) -> Results | None:
    try:
        results = read_results(folder / "results.h5")
    except CheckpointError:
        return None
    return results if results.status == "finished" else None


def _accuracy(results: Results) -> float:
    return float(results.rounds["eval_accuracy"][-1])


def _row(trial: Trial, results: Results) -> dict[str, object]:
    assert results.baselines is not None
    return {
        "method": trial.method,
        "learning_rate": trial.rate,
        "seed": trial.seed,
        "split": trial.split,
        "accuracy": round(_accuracy(results), 4),
        "macro_f1": round(float(results.rounds["eval_macro_f1"][-1]), 4),
        "sent_bytes": results.baselines.sent_bytes,
        "reduction_vs_full_model": round(results.baselines.reduction_vs_full_model, 4),
    }


def _table(rows: Iterable[Mapping[str, object]]) -> str:
    lines = [
        "| method | learning rate | accuracy, mean of seeds | seeds | less sent than FedAvg |",
        "|---|---|---|---|---|",
    ]
    by_method: dict[object, list[Mapping[str, object]]] = {}
    for row in rows:
        if row["split"] == "test":
            by_method.setdefault(row["method"], []).append(row)
    for method, group in by_method.items():
        values = [float(str(row["accuracy"])) for row in group]
        less = 100 * float(str(group[0]["reduction_vs_full_model"]))
        spread = (
            f"{np.mean(values):.3f} (sd {np.std(values, ddof=1):.3f})"
            if len(values) > 1
            else f"{values[0]:.3f}"
        )
        listed = ", ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {method} | {group[0]['learning_rate']} | {spread} | {listed} | {less:.2f} % |")
    return "\n".join(lines)


@click.command()
@click.argument("run_file", default="examples/newsgroups.toml")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/compare"), help="Folder for the runs."
)
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write one line a run here.")
@click.option("--rounds", default=20, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Runs at a time, one core each.")
@click.option(
    "--fixed-rank", default=11, show_default=True, help="Rank whose bytes equal the annealed run's."
)
@click.option("--set", "extra", multiple=True, help="section.key=value for every run.")
def main(
    run_file: str,
    out: Path,
    csv_file: Path | None,
    rounds: int,
    seeds: int,
    jobs: int,
    fixed_rank: int,
    extra: tuple[str, ...],
) -> None:
    """Run the comparison and print a Markdown table."""
    out.mkdir(parents=True, exist_ok=True)
    METHODS["fixed rank"] = Method(
        {"federation.method": "fedit", "lora.rank_max": str(fixed_rank), "lora.alpha": str(2 * fixed_rank)}
    )
    common = [
        f"federation.num_rounds={rounds}",
        "data.validation_fraction=0.1",
        f"evaluation.every={rounds}",
    ]
    common += ["evaluation.max_examples=1200", *extra]
    with ThreadPoolExecutor(jobs) as pool:

        def run_all(trials: list[Trial]) -> dict[Trial, Results]:
            return dict(
                zip(
                    trials,
                    pool.map(lambda trial: run_trial(trial, run_file, common, out), trials),
                    strict=True,
                )
            )

        tried = run_all(
            [Trial(name, rate, 0, "validation") for name, method in METHODS.items() for rate in method.rates]
        )
        chosen = {
            name: max(
                (trial for trial in tried if trial.method == name), key=lambda trial: _accuracy(tried[trial])
            ).rate
            for name in METHODS
        }
        measured = run_all(
            [Trial(name, chosen[name], seed, "test") for seed in range(seeds) for name in METHODS]
        )
    rows = [_row(trial, results) for trial, results in {**tried, **measured}.items()]
    if csv_file:
        write_csv(csv_file, rows)
    print(_table(rows))


if __name__ == "__main__":
    main()
