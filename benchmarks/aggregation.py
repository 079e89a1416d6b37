"""Time the two ways to the SVD of a product, and check the cost model that chooses between them.

    python benchmarks/aggregation.py

The product is what a server aggregates: b (out, inner) @ a (inner, in) with inner = clients * lora_rank.
Times are this process's CPU time in one thread, both ways in turn, so that other work on the machine
disturbs little. Read the ratios; the milliseconds are this machine's.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from mpifedlora.core.layout import Factors
from mpifedlora.core.lowrank import Svd, _svd_dense, _svd_factored, factored_is_cheaper

# (out, in): the linear layers of MiniLM, then BERT-base, then one of a larger model.
SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (2048, 2048))
# Among them those just below min(in, out), where the choice is close.
INNERS = (8, 32, 64, 128, 256, 352, 384, 512, 704, 768, 1024)
# The median of some repeats after a warm-up; once and cold where one dense SVD takes seconds.
REPEATS, LARGE = 3, 3_000_000
BOUND = 1.2
RESULTS = Path(__file__).parent / "results" / "aggregation.csv"


@dataclass(frozen=True)
class Timing:
    """Both ways at one shape."""

    out_features: int
    in_features: int
    inner: int
    factored_ms: float
    dense_ms: float
    ratio: float  # factored over dense
    chosen: str
    chosen_over_best: float


def measure(out_features: int, in_features: int, inner: int) -> Timing:
    """Time both ways at one shape, and look which one the cost model takes."""
    generator = torch.Generator().manual_seed(inner)
    a = torch.randn(inner, in_features, generator=generator)
    product = Factors(a, torch.randn(out_features, inner, generator=generator))
    factored, dense = _milliseconds(product)
    is_factored = factored_is_cheaper(out_features, in_features, inner)
    return Timing(
        out_features=out_features,
        in_features=in_features,
        inner=inner,
        factored_ms=round(factored, 3),
        dense_ms=round(dense, 3),
        ratio=round(factored / dense, 4),
        chosen="factored" if is_factored else "dense",
        chosen_over_best=round((factored if is_factored else dense) / min(factored, dense), 3),
    )


def _milliseconds(product: Factors) -> tuple[float, float]:
    ways = (_svd_factored, _svd_dense)
    is_large = product.b.shape[0] * product.a.shape[1] > LARGE
    if not is_large:
        for way in ways:
            way(product)
    rounds = range(1 if is_large else REPEATS)
    times = [[_elapsed(way, product) for way in ways] for _ in rounds]
    factored, dense = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return factored, dense


def _elapsed(way: Callable[[Factors], Svd], product: Factors) -> float:
    start = time.process_time()
    way(product)
    return time.process_time() - start


def _line(row: Timing) -> str:
    shape = f"({row.out_features}, {row.in_features})"
    times = f"{row.factored_ms:.2f} | {row.dense_ms:.2f} | {row.ratio:.3f}"
    return f"| {shape} | {row.inner} | {times} | {row.chosen} | {row.chosen_over_best:.2f} |"


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=RESULTS,
    help="One line a shape.",
)
def main(out: Path) -> None:
    """Time both ways, print a Markdown table and whether the choice holds its bound."""
    torch.set_num_threads(1)
    print("| (out, in) | inner | factored, ms | dense, ms | factored / dense | chosen | chosen / best |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for shape in SHAPES:
        for inner in INNERS:
            rows.append(measure(*shape, inner))
            print(_line(rows[-1]), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    worst = max(row.chosen_over_best for row in rows)
    print(f"chosen / best is at most {BOUND}: {'yes' if worst <= BOUND else 'no'} (worst: {worst:.2f})")
    sys.exit(worst > BOUND)


if __name__ == "__main__":
    main()
