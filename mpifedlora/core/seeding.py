"""Where every random stream starts.

A stream belongs to `(seed, purpose, round_num, client_id)` and to nothing else: neither to the
number of workers nor to what was drawn before.
"""

from __future__ import annotations

import hashlib

import numpy as np


def numpy_generator(seed: int, purpose: str, round_num: int = 0, client_id: int = 0) -> np.random.Generator:
    """Return a fresh generator for one purpose, round and client.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for; different purposes give independent streams.
        round_num: Round, 0 for draws before training.
        client_id: Client, 0 for draws that concern all clients.

    Returns:
        A PCG64 generator at the start of its stream.

    >>> a, b = numpy_generator(0, "cohort", round_num=3), numpy_generator(0, "cohort", round_num=3)
    >>> bool(a.random() == b.random())
    True
    """
    # PCG64 by name: numpy may change what default_rng stands for.
    return np.random.Generator(np.random.PCG64(_sequence("numpy", seed, purpose, round_num, client_id)))


def torch_seed(seed: int, purpose: str, round_num: int = 0, client_id: int = 0) -> int:
    """Return the number to seed a torch generator with, for one purpose, round and client.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for; different purposes give independent streams.
        round_num: Round, 0 for draws before training.
        client_id: Client, 0 for draws that concern all clients.

    Returns:
        An integer in [0, 2**63), which `torch.Generator.manual_seed` takes as it is.

    >>> 0 <= torch_seed(0, "dropout", round_num=1, client_id=4) < 2**63
    True
    """
    state = _sequence("torch", seed, purpose, round_num, client_id).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def _sequence(
    library: str, seed: int, purpose: str, round_num: int, client_id: int
) -> np.random.SeedSequence:
    # A digest of the whole tuple, because SeedSequence pads its words with zeros ([1] and [1, 0] are
    # one stream) and splits integers of 2**32 and more. hash() would differ between processes.
    key = repr((library, int(seed), purpose, int(round_num), int(client_id)))
    return np.random.SeedSequence(int.from_bytes(hashlib.sha256(key.encode()).digest(), "little"))
