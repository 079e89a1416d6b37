"""Compare new results of benchmarks with the committed ones.

    python benchmarks/check.py NEW.json...

Compared are ratios that have a bound, by their labels: times differ between machines, ratios carry over.
A ratio is worse if it has moved by more than 20 % towards its bound, or beyond.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import common

TOLERANCE = 1.2


@click.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--strict", is_flag=True, help="Exit with 1 where something is worse.")
@click.option("--results", type=click.Path(path_type=Path), default=common.RESULTS, help="Committed results.")
def main(files: Sequence[Path], strict: bool, results: Path) -> None:
    """Warn where ratios in FILES are worse by more than 20 % than in the committed results."""
    warnings = [line for file in files for line in compare_file(file, results)]
    for line in warnings:
        print(f"warning: {line}")
    sys.exit(1 if strict and warnings else 0)


def compare_file(file: Path, results: Path) -> list[str]:
    """Return what is worse in a file than in the committed file of the same name; print what was compared."""
    new = json.loads(file.read_text())
    committed = results / f"{new['name']}.json"
    if not committed.exists():
        print(f"{new['name']}: nothing committed to compare with")
        return []
    old = json.loads(committed.read_text())
    shared = [label for label in new["bounds"] if old["ratios"].get(label) is not None]
    print(f"{new['name']}: {len(shared)} of {len(new['bounds'])} ratios compared with {committed.name}")
    return [f"{new['name']}: {line}" for line in worse(new, old)]


def worse(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[str]:
    """Give a line for each ratio of `new` with a bound that is worse than in `old`."""
    for label, bounds in new["bounds"].items():
        value, before = new["ratios"][label], old["ratios"].get(label)
        if before is None:
            continue
        if value is None:
            yield f"{label} is not finite, was {before:.3f}"
        elif "at_most" in bounds and value > TOLERANCE * before:
            yield f"{label} rose from {before:.3f} to {value:.3f}"
        elif "at_least" in bounds and value < before / TOLERANCE:
            yield f"{label} fell from {before:.3f} to {value:.3f}"


if __name__ == "__main__":
    main()
