"""Who trains in a round, and on which worker: pure in (seed, round_num)."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mpifedlora.core.seeding import numpy_generator


def choose_cohort(
    eligible: Sequence[int], cohort_size: int | None, seed: int, round_num: int
) -> tuple[int, ...]:
    """Draw the clients of one round, without doubles, in rising order.

    Args:
        eligible: ids of the clients that have examples.
        cohort_size: clients to draw; None, or more than there are, takes all.
        seed: of the run.
        round_num: 1..num_rounds.
    """
    if cohort_size is None or cohort_size >= len(eligible):
        return tuple(sorted(eligible))
    drawn = numpy_generator(seed, "cohort", round_num).choice(eligible, cohort_size, replace=False)
    return tuple(sorted(int(client_id) for client_id in drawn))


def draw_poisson_cohort(
    eligible: Sequence[int], probability: float, generator: np.random.Generator
) -> tuple[int, ...]:
    """Let every client take part on its own with one probability: the cohort may be of any size, or empty.

    Args:
        eligible: ids of the clients that have examples.
        probability: of taking part, in [0, 1].
        generator: of the round. Where privacy counts on nobody knowing the cohort, it may not start
            from a seed that is known.

    References:
        DP-FedAvg, arXiv 1710.06963: the sampling that the accountant of Poisson sampling assumes.
    """
    takes_part = generator.random(len(eligible)) < probability
    return tuple(sorted(int(client_id) for client_id in np.asarray(eligible)[takes_part]))


def assign_clients(cohort: Sequence[int], load: Mapping[int, int], num_workers: int) -> dict[int, int]:
    """Spread clients over workers by load: the longest first, each to the least loaded worker.

    Args:
        cohort: ids of the clients of the round.
        load: examples that each client trains on in a round.
        num_workers: at least 1.

    Returns:
        worker_id of each client. The longest worker has at most 4/3 of the best possible load.

    References:
        Graham, Bounds on multiprocessing timing anomalies, SIAM J. Appl. Math. 17 (1969), LPT rule.

    >>> assign_clients([0, 1, 2], {0: 5, 1: 3, 2: 3}, 2)
    {0: 0, 1: 1, 2: 1}
    """
    loads = [(0, 0, worker_id) for worker_id in range(num_workers)]
    workers: dict[int, int] = {}
    for client_id in sorted(cohort, key=lambda client_id: (-load[client_id], client_id)):
        done, count, worker_id = heapq.heappop(loads)
        heapq.heappush(loads, (done + load[client_id], count + 1, worker_id))
        workers[client_id] = worker_id
    return workers


def share_out_files(seen: Sequence[Collection[str]]) -> dict[str, int]:
    """Give each client's file to one of the workers that see it, the one with the fewest so far.

    On storage that all workers see, every worker gets an equal number; where each worker sees its own
    site's files alone, it gets these.

    Args:
        seen: file names by worker.

    Returns:
        worker_id by file name, in the order of the names, which is that of the clients.

    >>> share_out_files([["a.csv", "b.csv", "c.csv"], ["b.csv", "c.csv"]])
    {'a.csv': 0, 'b.csv': 1, 'c.csv': 0}
    """
    counts = [0] * len(seen)
    owners = {}
    for name in sorted(set().union(*seen)):
        worker_id = min(
            (count, worker_id) for worker_id, count in enumerate(counts) if name in seen[worker_id]
        )[1]
        counts[worker_id] += 1
        owners[name] = worker_id
    return owners
