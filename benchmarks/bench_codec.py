"""Measure the wire dtypes: their bytes, and how long encoding and decoding take against a copy of the values.

    python benchmarks/bench_codec.py --json benchmarks/results/bench_codec.json

Each is timed in turn with the copy, in one thread. A wire dtype pays on networks below its break-even rate:
the bytes that it saves over the seconds that it takes on both ends.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import common
import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.codec import decode, draw_uniform, encode, num_bytes
from mpifedlora.core.layout import AdapterLayout, LinearShape, TensorShape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEED = 0
DTYPES = ("bfloat16", "float16", "int8")
# Of the float32 bytes; int8 has a scale for each direction beside its values.
BYTES_BOUNDS = {"bfloat16": 0.5, "float16": 0.5, "int8": 0.26}
# Times as long as a copy; stochastic rounding draws a random number a value.
TIME_BOUNDS = {"bfloat16": (3.0, 3.0), "float16": (6.0, 3.0), "int8": (60.0, 8.0)}


def layouts() -> dict[str, AdapterLayout]:
    """Return what is encoded: a small adapter, a larger one, and a model's own matrices."""
    layer = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
    minilm = tuple(LinearShape("linear", *sizes) for sizes in layer * 6)
    llama = (LinearShape("linear", 4096, 4096),) * 64
    matrices = tuple(TensorShape("matrix", sizes) for sizes in layer * 3)
    return {
        "adapter of 2.7 MB": AdapterLayout(minilm, (16,) * len(minilm)),
        "adapter of 33.6 MB": AdapterLayout(llama, (16,) * len(llama)),
        "matrices of 21 MB": AdapterLayout((), (), matrices),
    }


class Outcome(NamedTuple):
    """What was measured of one dtype and one layout."""

    dtype: str
    layout: str
    megabytes: float
    byte_share: float
    encoding: common.Pair
    decoding: common.Pair

    @property
    def break_even(self) -> float:
        """Megabytes a second of a network on which the dtype neither wins nor loses."""
        seconds = statistics.median(self.encoding.first_s) + statistics.median(self.decoding.first_s)
        return self.megabytes * (1 - self.byte_share) / seconds


def measure(dtype: str, name: str, layout: AdapterLayout, repeats: int) -> Outcome:
    """Time encoding and decoding, each in turn with a copy."""
    values = torch.empty(layout.num_values).normal_(0, 0.02, generator=torch.Generator().manual_seed(SEED))
    copied, wire = torch.empty_like(values), torch.empty(num_bytes(dtype, layout), dtype=torch.uint8)

    def copy() -> Tensor:
        return copied.copy_(values)

    encoding = common.alternate(_encoder(dtype, layout, values, wire), copy, repeats, warm_up=2)
    read = torch.empty_like(values)
    decoding = common.alternate(partial(decode, dtype, layout, wire, read), copy, repeats, warm_up=2)
    share = wire.nbytes / values.nbytes
    return Outcome(dtype, name, values.nbytes / 1e6, share, encoding, decoding)


def _encoder(dtype: str, layout: AdapterLayout, values: Tensor, wire: Tensor) -> Callable[[], None]:
    generator = np.random.default_rng(SEED)

    def run() -> None:
        uniform = draw_uniform(layout.num_values, generator) if dtype == "int8" else None
        encode(dtype, layout, values, wire, uniform)

    return run


def outcomes(*, quick: bool) -> Iterator[Outcome]:
    """Measure all dtypes and layouts."""
    for name, layout in layouts().items():
        for dtype in DTYPES:
            yield measure(dtype, name, layout, 5 if quick else 31)


def record(report: common.Report, outcome: Outcome) -> None:
    """Put an outcome into the report."""
    where = f"{outcome.dtype}, {outcome.layout}"
    report.ratio(f"bytes / float32, {where}", outcome.byte_share, at_most=BYTES_BOUNDS[outcome.dtype])
    for what, pair, bound in zip(
        ("encode", "decode"), (outcome.encoding, outcome.decoding), TIME_BOUNDS[outcome.dtype], strict=True
    ):
        report.samples(f"{what}_s", pair.first_s, dtype=outcome.dtype, layout=outcome.layout)
        report.ratio(f"{what} / copy, {where}", pair.ratio, at_most=bound)
    print(f"{where:<30} pays below {outcome.break_even:6.0f} MB/s")
    report.sample("break_even_mb_per_s", outcome.break_even, dtype=outcome.dtype, layout=outcome.layout)


def draw(measured: Sequence[Outcome], figure: Figure) -> None:
    """Draw the throughput of both ways, a bar for each dtype and layout."""
    panels = figure.subplots(1, 2, sharey=True)
    labels = [f"{outcome.dtype}\n{outcome.layout}" for outcome in measured]
    for axes, what in zip(panels, ("encoding", "decoding"), strict=True):
        seconds = [statistics.median(getattr(outcome, what).first_s) for outcome in measured]
        rates = [outcome.megabytes / 1e3 / each for outcome, each in zip(measured, seconds, strict=True)]
        axes.barh(labels, rates, color=[common.COLORS[DTYPES.index(outcome.dtype)] for outcome in measured])
        axes.set(xlabel="GB/s of float32", title=what)
    panels[0].tick_params("y", labelsize=9)
    panels[0].invert_yaxis()


@common.options
def main(quick: bool, json_path: Path | None) -> int:
    """Measure bytes and speed of the wire dtypes."""
    torch.set_num_threads(1)
    report = common.Report("bench_codec", SEED)
    measured = list(outcomes(quick=quick))
    for outcome in measured:
        record(report, outcome)
    return report.finish(json_path, partial(draw, measured))


if __name__ == "__main__":
    main()
