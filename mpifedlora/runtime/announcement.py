"""What a run says before its first round: who takes part, by which method, and on which data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mpifedlora.core.config import RunConfig
from mpifedlora.core.method_config import ranks_of_clients
from mpifedlora.core.units import counted
from mpifedlora.io.output_folder import free_name
from mpifedlora.io.results_schema import Ints, RunInfo
from mpifedlora.io.run_file import ResolvedRun

MAX_CLIENTS, MAX_LABELS, LABEL_WIDTH = 16, 10, 7
_SCOPES = {
    "full": "the whole model trained",
    "adapter": "A and B trained",
    "b-only": "B trained",
    "alternating": "B and A trained in turn",
}


def first_lines(resolved: ResolvedRun, info: RunInfo, num_parameters: int, out: Path) -> Iterator[str]:
    """Return the lines of a run's announcement.

    Args:
        resolved: the configuration.
        info: what runs.
        num_parameters: of the base model, head included.
        out: folder for the results.
    """
    config, federation = resolved.config, resolved.config.federation
    yield (
        f"mpifedlora {info.package_version}: {info.method} on {info.dataset} with {info.model}, "
        f"{num_parameters / 1e6:.1f} M parameters, {len(info.module_names)} adapted layers"
    )
    yield (
        f"{counted(federation.num_clients, 'client')} on {counted(info.num_workers, 'worker')} "
        f"({_devices(info.devices)}), {counted(federation.num_rounds, 'round')}, seed {federation.seed}, "
        f"{info.mpi_library}{', workers may die' if info.survives_lost_workers else ''}"
    )
    yield method_line(config)
    yield transport_line(info)
    yield from label_lines(info.label_table, info.label_names, client_names=info.client_names)
    yield from _notes(resolved, info)
    yield f"results in {free_name(out)}"


_COLLECTS = {
    "gather in parts": "updates are aggregated part by part while they come in",
    "gather": "updates are gathered and then aggregated",
    "reduce": "updates are added up on the way to the server",
    "handed over": "updates are handed over in memory",
}


def transport_line(info: RunInfo) -> str:
    """Return how updates cross, and what the start took."""
    text = _COLLECTS[info.collect]
    if (info.uplink_dtype, info.downlink_dtype) != ("float32", "float32"):
        text += f", as {info.uplink_dtype} up and {info.downlink_dtype} down"
    if info.gpu_buffers != "none":
        text += f", GPU buffers {info.gpu_buffers}"
    return text if math.isnan(info.startup_s) else f"{text}; ready {info.startup_s:.1f} s after the launch"


def method_line(config: RunConfig) -> str:
    """Return the method's switches in one line; those that do nothing are left out."""
    aggregation = config.aggregation
    parts = [_SCOPES[config.training.scope]]
    if config.training.scope != "full":
        parts += [_budget(config), f"{aggregation.kind} aggregation"]
    if config.initiating.rounds:
        rounds = "1 round" if config.initiating.rounds == 1 else f"{config.initiating.rounds} rounds"
        parts.append(f"initiating {rounds} ({config.initiating.scope})")
    if aggregation.weights != "examples":
        parts.append(f"{aggregation.weights} weights")
    if config.training.personal != "none":
        parts.append(f"{config.training.personal.replace('-', ' ')} kept by its client, own models measured")
    if config.training.control_variates:
        parts.append("control variates")
    if config.server_optimizer.kind != "none":
        parts.append(f"{config.server_optimizer.kind} on the server")
    if aggregation.robust != "none":
        parts.append(aggregation.robust)
    if config.privacy.clip_norm is not None:
        parts.append(
            f"updates clipped to {config.privacy.clip_norm:g}, noise {config.privacy.noise_multiplier:g}"
        )
    return ", ".join(parts)


def _budget(config: RunConfig) -> str:
    annealing, lora = config.annealing, config.lora
    if annealing.schedule == "constant":
        text = f"rank {lora.rank_max}"
    else:
        text = f"rank {lora.rank_max} to {lora.rank_min} ({annealing.schedule}, {annealing.cut})"
    ranks = ranks_of_clients(config)
    return text if set(ranks) == {lora.rank_max} else f"{text}, clients' ranks {min(ranks)} to {max(ranks)}"


def label_lines(
    table: Ints,
    names: Sequence[str],
    most: int = MAX_LABELS,
    client_names: Sequence[str] = (),
    whole: str = "label_table in results.h5",
) -> Iterator[str]:
    """Return the clients' label counts as a table; the most frequent labels, and the first clients.

    Args:
        table: (num_clients, num_labels).
        names: of the labels.
        most: labels that have a column of their own.
        client_names: by client id, or none.
        whole: what has all clients.
    """
    by_size = np.argsort(-table.sum(axis=0), kind="stable")
    # One label tells no more than the sum.
    shown = sorted(by_size[:most].tolist()) if len(names) > 1 else []
    others = sorted(by_size[most:].tolist())
    heads = [names[label][-LABEL_WIDTH:] for label in shown] + (["others"] if others else [])
    yield f"training examples of each client{', by label' if shown else ''}:"
    yield _cells("client", ["all", *heads])
    for client_id, counts in enumerate(table[:MAX_CLIENTS].tolist()):
        row = [sum(counts), *(counts[label] for label in shown)]
        row += [sum(counts[label] for label in others)] if others else []
        name = f" {client_names[client_id]}" if client_names else ""
        yield _cells(str(client_id), [str(count) for count in row]) + name
    if len(table) > MAX_CLIENTS:
        yield f"... and {len(table) - MAX_CLIENTS} more clients ({whole} has all)"


def _cells(first: str, others: Sequence[str]) -> str:
    return f"{first:>6} " + " ".join(f"{text:>{LABEL_WIDTH}}" for text in others)


def _notes(resolved: ResolvedRun, info: RunInfo) -> Iterator[str]:
    federation = resolved.config.federation
    if resolved.ignored_keys:
        keys = ", ".join(resolved.ignored_keys)
        yield f"note: method {info.method} sets {keys}; what the run file says of them is ignored"
    data, evaluation = resolved.config.data, resolved.config.evaluation
    if data.partition == "files" and data.test_source is None:
        key = f"{evaluation.split}_fraction"
        share = f"{key} = {getattr(data, key):g}"
        yield f"note: the workers measure, on what each client's file holds out ({share})"
    without = np.flatnonzero(info.label_table.sum(axis=1) == 0).tolist()
    if without:
        yield f"note: {len(without)} clients have no examples and never take part: {_listed(without)}"
    if federation.reproducible and not info.reproducible and len(set(info.devices)) > 1:
        yield (
            "note: devices or threads differ between processes, so other numbers of workers may give other "
            "bits; set training.threads and training.device to make them equal"
        )
    if info.is_private:
        yield "note: noise and cohorts come from the system's entropy, so another run gives other numbers"
    elif resolved.config.privacy.noise_multiplier:
        yield "note: privacy.noise_seed is set, so the noise can be taken away: this run is not private"
    if info.collect != "handed over" and not info.survives_lost_workers:
        yield (
            "note: a process that dies ends this job (--resume goes on); `mpifedlora doctor` says whether "
            "this MPI can do better"
        )
    if info.num_workers > federation.num_clients:
        yield (
            f"note: {info.num_workers} workers for {federation.num_clients} clients: "
            f"{info.num_workers - federation.num_clients} of them have nothing to train"
        )


def _devices(devices: Sequence[str]) -> str:
    kinds = " or ".join(sorted(set(devices[1:])))
    return kinds if set(devices) == set(devices[1:]) else f"{kinds}; server {devices[0]}"


def _listed(clients: Sequence[int]) -> str:
    shown = ", ".join(str(client) for client in clients[:10])
    return shown if len(clients) <= 10 else f"{shown}, ..."
