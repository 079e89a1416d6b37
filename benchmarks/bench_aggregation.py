"""Time the SVD that aggregates and cuts a module: from the factors, from the dense product, and in batches.

    python benchmarks/bench_aggregation.py --json benchmarks/results/bench_aggregation.json

The product is what a server aggregates: b (out, inner) @ a (inner, in) with inner = clients * lora_rank.
Held are: the way that the cost model chooses against the better of the two; factored against dense at
Llama-7B's 4096 x 4096; the error of the cut against the best one in float64. The two ways are timed in turn
as this process's CPU time in one thread, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import common
import torch

from mpifedlora.core.aggregation import normalise
from mpifedlora.core.layout import Factors
from mpifedlora.core.lowrank import (
    Svd,
    _dense_cost,
    _factored_cost,
    _svd_dense,
    _svd_factored,
    _svds_in_batches,
    error_energy,
    factored_is_cheaper,
    factors_of,
    stack_weighted,
    svd_of_product,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEED = 0
LORA_RANK = 16
CLIENTS = (8, 32, 128)

# (out, in) of the linear layers.
MODELS = {
    "MiniLM": ((384, 384), (1536, 384), (384, 1536)),
    "BERT-large": ((1024, 1024), (4096, 1024), (1024, 4096)),
    "Llama-7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "Llama-70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
}
# Where the cost model is checked: MiniLM, BERT-base, one of a larger model; in the quick run, the first two.
MODELLED_SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (2048, 2048))
NUM_QUICK_SHAPES = 2
# Among them those just below min(in, out), where the choice is close.
INNERS = (8, 32, 64, 128, 256, 352, 384, 512, 704, 768, 1024)

# (out, in), inner, modules.
BATCHES = (((384, 384), 8, 24), ((384, 384), 32, 24), ((384, 384), 128, 24), ((1024, 1024), 128, 12))

# In the cost model's unit, of which a slow core does about 1e11 a second: what costs more than ONCE is timed
# once, and cold; a dense SVD or a reference above AFFORDABLE is left out. The quick run leaves out these
# above ONCE, and layers above QUICK.
ONCE, AFFORDABLE, QUICK = 8e10, 2.5e11, 4e10
REPEATS = 3

CHOSEN_BOUND = 1.2
SPEEDUP_BOUND = 30
ERROR_BOUND = 1.00001


class Size(NamedTuple):
    """Of a product."""

    out_features: int
    in_features: int
    inner: int

    @property
    def shape(self) -> str:
        """Words for (out, in)."""
        return f"{self.out_features}x{self.in_features}"

    @property
    def best_cost(self) -> float:
        """By the cost model, of the cheaper way."""
        return min(_factored_cost(*self), _dense_cost(*self))


# The dense SVD that is measured although it takes about a minute: Llama-7B's q, 8 clients.
LARGEST_DENSE = Size(4096, 4096, 8 * LORA_RANK)


class Timing(NamedTuple):
    """Both ways at one size, seconds; what was not timed is nan."""

    model: str
    size: Size
    factored_s: float
    dense_s: float

    @property
    def has_dense(self) -> bool:
        """Whether the dense way was timed."""
        return not math.isnan(self.dense_s)

    @property
    def chosen_over_best(self) -> float:
        """What the cost model's choice costs, at least 1."""
        chosen = self.factored_s if factored_is_cheaper(*self.size) else self.dense_s
        return chosen / min(self.factored_s, self.dense_s)


def gaussian(size: Size) -> Factors:
    """Draw a product without any structure."""
    generator = torch.Generator().manual_seed(SEED)
    a = torch.randn(size.inner, size.in_features, generator=generator)
    return Factors(a, torch.randn(size.out_features, size.inner, generator=generator))


def cohort(size: Size) -> Factors:
    """Draw what clients send, stacked: falling directions that all share, and half as much of their own."""
    generator = torch.Generator().manual_seed(SEED)
    falling = torch.logspace(0, -2, LORA_RANK)
    shared_a = torch.randn(LORA_RANK, size.in_features, generator=generator)
    shared_b = torch.randn(size.out_features, LORA_RANK, generator=generator) * falling
    clients = []
    for _ in range(size.inner // LORA_RANK):
        a = torch.randn(shared_a.shape, generator=generator).mul_(0.5).add_(shared_a)
        clients.append(
            Factors(a, torch.randn(shared_b.shape, generator=generator) * 0.5 * falling + shared_b)
        )
    return stack_weighted(clients, normalise(range(1, len(clients) + 1)))


def cpu_seconds(
    ways: Sequence[Callable[[Factors], Svd]], product: Factors, repeats: int
) -> list[list[float]]:
    """Time the ways in turn, with a warm-up where there are repeats; seconds by way and repeat."""
    seconds: list[list[float]] = [[] for _ in ways]
    for repeat in range(-(repeats > 1), repeats):
        for way, column in zip(ways, seconds, strict=True):
            started = time.process_time()
            way(product)
            if repeat >= 0:
                column.append(time.process_time() - started)
    return seconds


def time_ways(report: common.Report, model: str, size: Size, product: Factors, times_dense: bool) -> Timing:
    """Time the factored way, and the dense way in turn with it where that is wanted."""
    ways = [_svd_factored, _svd_dense] if times_dense else [_svd_factored]
    cost = _factored_cost(*size) + times_dense * _dense_cost(*size)
    medians = [math.nan, math.nan]
    for place, column in enumerate(cpu_seconds(ways, product, 1 if cost > ONCE else REPEATS)):
        label = ("factored_s", "dense_s")[place]
        report.samples(label, column, model=model, **size._asdict())
        medians[place] = statistics.median(column)
    return Timing(model, size, *medians)


def check_cost_model(report: common.Report, quick: bool) -> list[Timing]:
    """Time both ways at many sizes; hold the choice's worst over each shape."""
    timings = []
    for shape in MODELLED_SHAPES[: NUM_QUICK_SHAPES if quick else None]:
        sizes = [Size(*shape, inner) for inner in INNERS]
        row = [time_ways(report, "cost model", size, gaussian(size), True) for size in sizes]
        worst = max(timing.chosen_over_best for timing in row)
        label = f"chosen / better way, {sizes[0].shape}, worst of {len(INNERS)} inner dimensions"
        report.ratio(label, worst, at_most=CHOSEN_BOUND)
        timings += row
    return timings


def time_models(report: common.Report, quick: bool) -> list[Timing]:
    """Time the layers of real models for some numbers of clients, and judge the results' errors."""
    timings = []
    for model, shapes in MODELS.items():
        both: list[float] = []
        errors: list[float] = []
        for size in _sizes(shapes, quick):
            product = cohort(size)
            timing = _time_layer(report, model, size, product, quick)
            timings.append(timing)
            both += [timing.chosen_over_best] if timing.has_dense else []
            errors += _error_over_best(report, size, product, quick)
        if both:
            label = f"chosen / better way, {model}, worst of {len(both)}"
            report.ratio(label, max(both), at_most=CHOSEN_BOUND)
        label = f"error / best error, {model}, worst of {len(errors)}"
        report.ratio(label, max(errors), at_most=ERROR_BOUND)
    return timings


def _sizes(shapes: Sequence[tuple[int, int]], quick: bool) -> list[Size]:
    sizes: list[Size] = []
    for place, shape in enumerate(shapes):
        # A transpose costs the same: it is not timed again for the largest cohort.
        is_known = shape[::-1] in shapes[:place]
        cohorts = CLIENTS[:-1] if quick or is_known else CLIENTS
        sizes += [Size(*shape, LORA_RANK * clients) for clients in cohorts]
    return [size for size in sizes if size.best_cost <= QUICK] if quick else sizes


def _time_layer(report: common.Report, model: str, size: Size, product: Factors, quick: bool) -> Timing:
    is_largest = size == LARGEST_DENSE and not quick
    times_dense = is_largest or _dense_cost(*size) <= (ONCE if quick else AFFORDABLE)
    timing = time_ways(report, model, size, product, times_dense)
    label = f"{model} {size.shape}, {size.inner // LORA_RANK} clients"
    print(f"{label}: factored {timing.factored_s:.3g} s, dense {timing.dense_s:.3g} s", flush=True)
    if times_dense and size.inner == LORA_RANK * CLIENTS[0]:
        bound = SPEEDUP_BOUND if is_largest else None
        report.ratio(f"dense / factored, {label}", timing.dense_s / timing.factored_s, at_least=bound)
    return timing


def _error_over_best(report: common.Report, size: Size, product: Factors, quick: bool) -> list[float]:
    """Return the error of the result at LORA_RANK over the least possible; nothing without a reference."""
    reference = _reference(size, product, ONCE if quick else AFFORDABLE)
    if reference is None:
        return []
    error = math.sqrt(error_energy(product, factors_of(svd_of_product(product), 0, LORA_RANK)))
    best = float(reference.s[LORA_RANK:].square().sum().sqrt())
    report.sample("relative_error", error / float(reference.s.square().sum().sqrt()), **size._asdict())
    return [error / best]


def _reference(size: Size, product: Factors, affordable: float) -> Svd | None:
    """Return the SVD in float64: of the dense product where that is affordable, else of the factors."""
    exact = Factors(product.a.double(), product.b.double())
    if _dense_cost(*size) <= affordable:
        return _svd_dense(exact)
    return _svd_factored(exact) if _factored_cost(*size) <= affordable else None


def time_batches(report: common.Report) -> None:
    """Time modules of one shape in one batch against one by one, on each kind of device that is here."""
    for shape, inner, num_modules in BATCHES:
        size = Size(*shape, inner)
        products = [gaussian(size)] * num_modules
        label = f"{num_modules} modules {size.shape}, inner {inner}"
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            pair = common.alternate(_one_by_one(products, device), _in_one_batch(products, device), repeats=5)
            report.samples("one_by_one_s", pair.first_s, device=device, modules=num_modules, **size._asdict())
            report.samples("batched_s", pair.second_s, device=device, modules=num_modules, **size._asdict())
            report.ratio(f"one by one / batched on {device}, {label}", pair.ratio)


def _find(a: torch.Tensor, b: torch.Tensor) -> Svd:
    return svd_of_product(Factors(a, b))


def _one_by_one(products: Sequence[Factors], device: str) -> Callable[[], object]:
    if device == "cpu":
        return lambda: [svd_of_product(product) for product in products]
    return lambda: [_svds_in_batches(_find, [product], device) for product in products]


def _in_one_batch(products: Sequence[Factors], device: str) -> Callable[[], object]:
    return lambda: _svds_in_batches(_find, products, device)


def estimate_dense(report: common.Report, timings: Sequence[Timing]) -> list[float]:
    """Estimate dense times that were not measured, by the cost model from the largest one that was.

    They are kept as samples under a name of their own, and in no ratio.
    """
    measured = [timing for timing in timings if timing.has_dense]
    anchor = max(measured, key=lambda timing: _dense_cost(*timing.size))
    seconds_per_cost = anchor.dense_s / _dense_cost(*anchor.size)
    estimates = [math.nan] * len(timings)
    for place, timing in enumerate(timings):
        if not timing.has_dense:
            estimates[place] = seconds_per_cost * _dense_cost(*timing.size)
            report.sample("dense_estimate_s", estimates[place], model=timing.model, **timing.size._asdict())
    return estimates


def draw_models(axes: Axes, timings: Sequence[Timing], estimates: Sequence[float]) -> None:
    """Draw seconds by layer: factored for each number of clients, dense measured and estimated."""
    shapes = list(dict.fromkeys((timing.model, timing.size.shape) for timing in timings))
    places = [shapes.index((timing.model, timing.size.shape)) for timing in timings]
    for clients in CLIENTS:
        chosen = [k for k, timing in enumerate(timings) if timing.size.inner == LORA_RANK * clients]
        seconds = [timings[k].factored_s for k in chosen]
        axes.plot([places[k] for k in chosen], seconds, ls="", label=f"factored, {clients} clients")
    dense = [timing.dense_s for timing in timings]
    axes.plot(places, dense, ls="", marker="_", ms=16, color="black", zorder=3, label="dense, measured")
    axes.plot(places, estimates, ls="", marker="_", ms=16, color="0.6", label="dense, estimate")
    axes.set_xticks(
        range(len(shapes)), [" ".join(shape) for shape in shapes], rotation=60, ha="right", fontsize=9
    )
    axes.set(yscale="log", ylabel="CPU seconds, one thread", title="One layer, LoRA rank 16")
    axes.legend(fontsize=9)


def draw_cost_model(axes: Axes, timings: Sequence[Timing]) -> None:
    """Draw factored over dense time by inner dimension, marked where dense is chosen."""
    for shape in dict.fromkeys(timing.size.shape for timing in timings):
        row = [timing for timing in timings if timing.size.shape == shape]
        x = [timing.size.inner / min(timing.size[:2]) for timing in row]
        y = [timing.factored_s / timing.dense_s for timing in row]
        (line,) = axes.plot(x, y, label=shape)
        is_dense = [not factored_is_cheaper(*timing.size) for timing in row]
        line.set(markevery=is_dense)
    axes.axhline(1, color="0.4", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="inner / min(out, in)", ylabel="factored / dense time")
    axes.set_title("Markers: dense is chosen")
    axes.legend(fontsize=9)


@common.options
def main(quick: bool, json_path: Path | None) -> int:
    """Time both ways to the SVD of a product, and check the cost model that chooses between them."""
    torch.set_num_threads(1)
    report = common.Report("bench_aggregation", SEED)
    models = time_models(report, quick)
    modelled = check_cost_model(report, quick)
    time_batches(report)
    estimates = estimate_dense(report, models)

    def figure(canvas: Figure) -> None:
        left, right = canvas.subplots(1, 2)
        draw_models(left, models, estimates)
        draw_cost_model(right, modelled)

    return report.finish(json_path, figure)


if __name__ == "__main__":
    main()
