"""Compare the wire dtypes by accuracy and bytes on one run file, several seeds each.

    python benchmarks/compare_dtypes.py --launcher "mpirun -n 3" --csv benchmarks/results/compare_dtypes.csv

The run file's method and learning rate stay as they are, for all dtypes the same; `error_feedback` needs a
basis that lasts, so it is compared under FedIT. Runs of one seed have the same clients, batches and test
examples, so each is compared with the float32 run of its own seed. Finished runs are not run again.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from mpifedlora.errors import CheckpointError
from mpifedlora.io.compare import write_csv
from mpifedlora.io.results import Results, read_results

Row = Mapping[str, object]

# Exact sums at a rate that does not follow the rank: what the committed table was made with.
EXACT = {"aggregation.kind": "product", "annealing.rate_exponent": "0"}


@dataclass(frozen=True)
class Wire:
    """A method, and what its messages are sent as."""

    method: str
    uplink: str
    downlink: str
    has_feedback: bool = False

    @property
    def name(self) -> str:
        """Its name in folders, such as `fedit-int8-int8-feedback`."""
        words = [self.method, self.uplink, self.downlink, *["feedback"] * self.has_feedback]
        return "-".join(words)

    def settings(self, seed: int) -> dict[str, str]:
        """Return what it sets in the run file."""
        return {
            "federation.method": self.method,
            "federation.seed": str(seed),
            "transport.uplink_dtype": self.uplink,
            "transport.downlink_dtype": self.downlink,
            "transport.error_feedback": str(self.has_feedback).lower(),
            "training.threads": "1",
            **(EXACT if self.method == "sa-fedlora" else {}),
        }


WIRES = (
    Wire("sa-fedlora", "float32", "float32"),
    Wire("sa-fedlora", "bfloat16", "bfloat16"),
    Wire("sa-fedlora", "float16", "float16"),
    Wire("sa-fedlora", "int8", "float32"),
    Wire("sa-fedlora", "int8", "int8"),
    Wire("fedit", "float32", "float32"),
    Wire("fedit", "int8", "int8"),
    Wire("fedit", "int8", "int8", has_feedback=True),
)


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


def _row(wire: Wire, seed: int, results: Results) -> dict[str, object]:
    rounds = results.rounds
    return {
        "method": wire.method,
        "uplink_dtype": wire.uplink,
        "downlink_dtype": wire.downlink,
        "error_feedback": wire.has_feedback,
        "seed": seed,
        "num_rounds": len(rounds["uplink_bytes"]),
        "accuracy": round(float(rounds["eval_accuracy"][-1]), 4),
        "loss": round(float(rounds["eval_loss"][-1]), 4),
        "uplink_bytes": int(rounds["uplink_bytes"].sum()),
        "downlink_bytes": int(rounds["downlink_bytes"].sum()),
    }


def _table(by_wire: Mapping[Wire, Sequence[Row]]) -> str:
    lines = [
        "| method | uplink | downlink | up, MB | down, MB | loss | change | accuracy | change, points |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for wire, rows in by_wire.items():
        exact = by_wire[Wire(wire.method, "float32", "float32")]
        first = rows[0]
        sent = [f"{float(str(first[key])) / 1e6:.1f}" for key in ("uplink_bytes", "downlink_bytes")]
        scores: list[str] = []
        for key, scale, digits in (("loss", 1, 3), ("accuracy", 100, 1)):
            values = _column(rows, key)
            scores.append(f"{values.mean():.3f}")
            is_exact = rows is exact
            scores.append("" if is_exact else _mean_and_error(scale * (values - _column(exact, key)), digits))
        uplink = wire.uplink + ", error feedback" * wire.has_feedback
        lines.append("| " + " | ".join([wire.method, uplink, wire.downlink, *sent, *scores]) + " |")
    return "\n".join(lines)


def _column(rows: Iterable[Row], key: str) -> np.ndarray:
    return np.array([float(str(row[key])) for row in rows])


def _mean_and_error(differences: np.ndarray, digits: int) -> str:
    mean = f"{differences.mean():+.{digits}f}"
    if len(differences) == 1:
        return mean
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return f"{mean} ± {error:.{digits}f}"


@click.command()
@click.argument("run_file", default="examples/newsgroups.toml")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/dtypes"), help="Folder for the runs."
)
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write one line a run here.")
@click.option("--rounds", default=8, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--launcher", default="", help='Words before each run, such as "mpirun -n 3"; the same bits.')
@click.option("--set", "extra", multiple=True, help="section.key=value for every run.")
def main(
    run_file: str,
    out: Path,
    csv_file: Path | None,
    rounds: int,
    seeds: int,
    launcher: str,
    extra: tuple[str, ...],
) -> None:
    """Run the comparison, seed by seed, and print a Markdown table."""
    out.mkdir(parents=True, exist_ok=True)
    common = [
        f"federation.num_rounds={rounds}",
        f"evaluation.every={rounds}",
        "evaluation.max_examples=1200",
    ]
    by_wire: dict[Wire, list[Row]] = {wire: [] for wire in WIRES}
    for seed in range(seeds):
        for wire, rows in by_wire.items():
            settings = [*common, *extra, *assignments(wire.settings(seed))]
            results = run_once(out / f"{wire.name}-{seed}", run_file, settings, shlex.split(launcher))
            rows.append(_row(wire, seed, results))
    if csv_file:
        write_csv(csv_file, [row for rows in by_wire.values() for row in rows])
    print(_table(by_wire))


if __name__ == "__main__":
    main()
