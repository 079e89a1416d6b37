"""What a round of Llama-7B and 70B costs, as rows: `scale.py` writes and shows them.

- Bytes: the package's own forecast, on the shapes of transformers' models.
- Seconds: latency, and the bandwidth of this machine's memory, from the fit of `bench_scaling.py` to its
  committed results; bandwidths of networks are assumed.
- The server's SVDs: from the committed times of `bench_aggregation.py`.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

import bench_scaling
import common
import numpy as np

from mpifedlora.core.combinations import check_reducible
from mpifedlora.core.config import RunConfig
from mpifedlora.core.forecast import RoundForecast, forecast
from mpifedlora.core.layout import LinearShape, ModelShapes
from mpifedlora.core.lowrank import _dense_cost, _factored_cost, factored_is_cheaper
from mpifedlora.core.methods import apply_method
from mpifedlora.runtime.method import build_switches

# Llama 2's; 70B has grouped-query attention: 8 heads of keys and values for 64 of queries.
MODELS: Mapping[str, Mapping[str, int]] = {
    "Llama-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "Llama-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
CLIENTS = (64, 1024)
WIRES = ("float32", "bfloat16")
FIXED_RANK = 16
# Tables of a run file. The annealed one is silent: its schedule is the package's default.
METHODS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "FedAvg": {"federation": {"method": "fedavg"}},
    f"rank {FIXED_RANK}": {"federation": {"method": "fedit"}, "lora": {"rank_max": FIXED_RANK}},
    "annealed": {"federation": {"method": "sa-fedlora"}},
}
FULL, FIXED, ANNEALED = METHODS
SERVER_GBIT = 10.0


class Link(NamedTuple):
    """An assumed network, whose links carry their bits per second in both directions.

    Args:
        name: of the clients' links.
        client: bits per second of a client's link.
        server: of the server's.
        is_cluster: whether MPI may pass a message on from node to node; else the server sends each its own.
    """

    name: str
    client: float
    server: float
    is_cluster: bool


class Row(NamedTuple):
    """The cost of the mean round of a run, and of its last round.

    Args:
        model: of `MODELS`.
        method: of `METHODS`.
        wire: dtype in both directions.
        link: its name.
        collect: `gather`, or `reduce` where the workers add up.
        clients: that all take part.
        up_bytes: of a client, mean over the rounds.
        down_bytes: of a client, mean over the rounds; in the first there is only a header.
        last_up_bytes: of a client, in the last round.
        last_down_bytes: of a client, in the last round.
        latency_s: of a round, as measured.
        link_s: of the mean round: latency, and transfer over the assumed link.
        memory_s: of the mean round by the measured fit alone, through this machine's memory.
        last_link_s: as link_s, of the last round.
    """

    model: str
    method: str
    wire: str
    link: str
    collect: str
    clients: int
    up_bytes: int
    down_bytes: int
    last_up_bytes: int
    last_down_bytes: int
    latency_s: float
    link_s: float
    memory_s: float
    last_link_s: float


class SvdRow(NamedTuple):
    """CPU seconds, in one thread, of a server that sums all products exactly and cuts the sum by SVD.

    Args:
        model: of `MODELS`.
        clients: whose factors it sums.
        fixed_s: of a round at the fixed rank.
        mean_s: of the mean round of the annealed run.
        last_s: of its last round.
        last_rank: of its last round.
        last_is_measured: whether all of last_s was timed; the others are scaled.
    """

    model: str
    clients: int
    fixed_s: float
    mean_s: float
    last_s: float
    last_rank: int
    last_is_measured: bool


AnyRow = TypeVar("AnyRow", Row, SvdRow)


def links(server_gbit: float = SERVER_GBIT) -> tuple[Link, Link]:
    """Return a cluster's network, and that of a federation whose server has so many Gbit/s."""
    return (
        Link("100 Gbit/s", 100e9, 100e9, is_cluster=True),
        Link("100 Mbit/s", 100e6, 1e9 * server_gbit, is_cluster=False),
    )


def model_shapes(sizes: Mapping[str, int]) -> ModelShapes:
    """Return the shapes of a Llama, all linear layers adapted as in a run; no weight is made."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from mpifedlora.training.base import BaseModel
    from mpifedlora.training.shapes import find_parts

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, **sizes))
    return find_parts(BaseModel(module, (), ("lm_head",)), "all-linear", ()).shapes


def make_config(method: str, wire: str, num_clients: int = 1) -> RunConfig:
    """Return the configuration of a run."""
    tables = METHODS[method]
    given = {
        "model": {"name": "llama"},
        "data": {"source": "texts.jsonl", "partition": "iid"},
        "task": {"name": "causal-lm"},
        "transport": {"uplink_dtype": wire, "downlink_dtype": wire},
        **tables,
        "federation": {**tables["federation"], "num_clients": num_clients, "reproducible": False},
    }
    return RunConfig.model_validate(apply_method(given)[0])


def rounds_of(config: RunConfig, shapes: ModelShapes) -> list[RoundForecast]:
    """Return what the rounds of a run send in which all clients take part."""
    num_clients = config.federation.num_clients
    return forecast(build_switches(config, [1] * num_clients, num_clients), shapes)


def can_reduce(config: RunConfig) -> bool:
    """Say whether the workers may add up their clients' updates on the way to the server."""
    try:
        check_reducible(config)
    except ValueError:
        return False
    return True


def transfer_s(link: Link, collect: str, num_clients: int, up_bytes: float, down_bytes: float) -> float:
    """Return the seconds in which a round's bytes cross the links, first down and then up.

    The server's link carries what each client sends or receives. But in a cluster a message goes down a
    binary tree of the nodes, level after level, and under `reduce` sums come up it.

    Args:
        link: of clients and server.
        collect: `gather` or `reduce`.
        num_clients: one on each worker.
        up_bytes: of a client.
        down_bytes: of a client.
    """
    star = max(1 / link.client, num_clients / link.server)
    tree = bench_scaling.features("reduce", num_clients, 0)[1] / link.client
    down, up = tree if link.is_cluster else star, tree if collect == "reduce" else star
    return 8 * (down * down_bytes + up * up_bytes)


def read_fits() -> dict[str, bench_scaling.Fit]:
    """Return the measured latency and bandwidth, by `gather` and `reduce`."""
    points = bench_scaling.read_points([common.RESULTS / "bench_scaling.json"])
    ways = {"gather": "in parts", "reduce": "reduce"}
    return {collect: bench_scaling.fit(points, way) for collect, way in ways.items()}


def rows_of(model: str, shapes: ModelShapes, method: str, wire: str, networks: Iterable[Link]) -> list[Row]:
    """Return the costs of a method, by links, ways to collect that it allows, and numbers of clients."""
    config, fits = make_config(method, wire), read_fits()
    # All take part in every round, so a client's bytes are the same however many there are: one is enough.
    sent = [(one.high.uplink.bytes, one.high.downlink.bytes) for one in rounds_of(config, shapes)]
    mean, last = [round(statistics.fmean(column)) for column in zip(*sent, strict=True)], sent[-1]
    rows = []
    for link in networks:
        for collect in ("gather", "reduce") if link.is_cluster and can_reduce(config) else ("gather",):
            for clients in CLIENTS:
                latency_s = fits[collect].seconds(clients, 0)
                link_s, last_s = (
                    latency_s + transfer_s(link, collect, clients, *one) for one in (mean, last)
                )
                memory_s = fits[collect].seconds(clients, sum(mean) / 2e6)  # as much down as up
                where = model, method, wire, link.name, collect, clients
                rows.append(_rounded(Row(*where, *mean, *last, latency_s, link_s, memory_s, last_s)))
    return rows


class SvdTimes:
    """Measured CPU seconds of one layer's SVD, and what follows from them at other inner dimensions.

    Between two measured inner dimensions the seconds a counted operation are interpolated, beyond them they
    stay the same. Where `bench_aggregation.py` did not time the dense way, its own estimate stands for it.

    Args:
        samples: of the results of that script.
    """

    def __init__(self, samples: Iterable[Mapping[str, Any]]) -> None:
        self._seconds: dict[tuple[str, int, int], dict[int, list[float]]] = {}
        self._timed: set[tuple[str, int, int, int]] = set()
        for sample in samples:
            way, _, kind = sample["label"].partition("_")
            if way in ("factored", "dense"):
                key = way, *sorted((sample["out_features"], sample["in_features"]))
                self._seconds.setdefault(key, {}).setdefault(sample["inner"], []).append(sample["value"])
                self._timed |= {(*key, sample["inner"])} if kind == "s" else set()

    def seconds(self, module: LinearShape, inner: int) -> float:
        """Return the seconds of the way that the package chooses."""
        way, short, long = key = _chosen_way(module, inner)
        cost = _factored_cost if way == "factored" else _dense_cost
        known = sorted(self._seconds[key].items())
        rates = [math.log(statistics.median(seconds) / cost(short, long, at)) for at, seconds in known]
        rate = np.interp(math.log(inner), [math.log(at) for at, _ in known], rates)
        return math.exp(rate) * cost(short, long, inner)

    def is_timed(self, module: LinearShape, inner: int) -> bool:
        """Say whether the seconds are not scaled."""
        return (*_chosen_way(module, inner), inner) in self._timed


def _chosen_way(module: LinearShape, inner: int) -> tuple[str, int, int]:
    # A transpose takes the same time.
    short, long = sorted(module[1:])
    return "factored" if factored_is_cheaper(*module[1:], inner) else "dense", short, long


def read_svd_times() -> SvdTimes:
    """Return the times that are committed."""
    content = json.loads((common.RESULTS / "bench_aggregation.json").read_text())
    return SvdTimes(sample for sample in content["samples"] if sample.get("model") in MODELS)


def svd_row(model: str, shapes: ModelShapes, clients: int) -> SvdRow:
    """Return what the server's SVDs take, annealed and at the fixed rank."""
    times = read_svd_times()
    rounds = rounds_of(make_config(ANNEALED, WIRES[0]), shapes)
    ranks = [one.high.plan.lora_ranks for one in rounds]

    def inners(lora_ranks: Sequence[int]) -> Iterable[tuple[LinearShape, int]]:
        return zip(shapes.modules, (clients * lora_rank for lora_rank in lora_ranks), strict=True)

    def seconds(lora_ranks: Sequence[int]) -> float:
        return sum(times.seconds(*each) for each in inners(lora_ranks))

    mean_s, last_s = statistics.fmean(map(seconds, ranks)), seconds(ranks[-1])
    is_timed = all(times.is_timed(*each) for each in inners(ranks[-1]))
    fixed_s = seconds([FIXED_RANK] * len(shapes.modules))
    return _rounded(SvdRow(model, clients, fixed_s, mean_s, last_s, max(ranks[-1]), is_timed))


def _rounded(row: AnyRow) -> AnyRow:
    # The last digits of a fit are those of the machine that has fitted it.
    values = [float(f"{value:.5g}") if isinstance(value, float) else value for value in row]
    return cast(AnyRow, type(row)(*values))


def compute(server_gbit: float = SERVER_GBIT) -> tuple[list[Row], list[SvdRow]]:
    """Compute all rows.

    Args:
        server_gbit: of the federation's server.
    """
    rows, svds = [], []
    for model, sizes in MODELS.items():
        shapes = model_shapes(sizes)
        for method in METHODS:
            for wire in WIRES:
                rows += rows_of(model, shapes, method, wire, links(server_gbit))
        svds += [svd_row(model, shapes, clients) for clients in CLIENTS]
    return rows, svds


def read_rows(kind: type[AnyRow], path: Path) -> list[AnyRow]:
    """Read rows from the CSV file in which they were written.

    Args:
        kind: `Row` or `SvdRow`.
        path: of the file.
    """
    types = get_type_hints(kind)
    parsers = {name: "True".__eq__ if each is bool else each for name, each in types.items()}
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [
        cast(AnyRow, kind(**{name: parsers[name](text) for name, text in line.items()})) for line in lines
    ]


def find(rows: Iterable[Row], **wanted: object) -> Row:
    """Return the one row that has these values."""
    (row,) = (row for row in rows if wanted.items() <= row._asdict().items())
    return row
