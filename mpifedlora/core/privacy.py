"""Client-level differential privacy: clipped updates, Gaussian noise on their sum, and what that spends.

DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963) clips each client's update to one norm and adds noise to
the sum before anything else reads it; so whole clients are protected, not examples. What the adapter learns
under noise depends on what is noisy: with A fixed (FFA-LoRA, arXiv 2403.12313) delta_weight is linear in B
and keeps Gaussian noise of mean zero. With noise on both factors it is (B + N_B)(A + N_A): the noise is
multiplied by the factors and by itself, and the last term N_B N_A is no longer Gaussian.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpifedlora.errors import ConfigError

# Values that are widened to float64, or drawn, at a time.
_CHUNK = 1 << 20
# Two float32 roundings lift a value by at most 2^-23 of it, and the norm may not pass its bound.
_ROUNDING_ROOM = 1 - 2**-22

# Steps of about a tenth: a finer grid gains some tenths of a percent of epsilon.
_LARGE_ORDERS = (
    *range(11, 21),
    *(22, 24, 26, 28, 30, 33, 36, 40, 45, 50, 56, 64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 1024),
)


def clip(update: Tensor, largest_norm: float) -> float:
    """Scale an update in place to a Euclidean norm of at most largest_norm.

    Args:
        update: flat (num_values,) float32. One that is not finite is left as it is: the server leaves it out.
        largest_norm: above 0; the sensitivity of a sum of clipped updates to one client.

    Returns:
        The norm before, in float64; not finite if the update is not. It is as private as the update.

    References:
        McMahan et al. 2018, arXiv 1710.06963, algorithm 1 (flat clipping).

    >>> update = torch.tensor([3.0, 4.0])
    >>> clip(update, 10.0), update.tolist()
    (5.0, [3.0, 4.0])
    """
    parts = torch.split(update, _CHUNK)
    norm = math.hypot(*(float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in parts))
    if largest_norm < norm < math.inf:
        update.mul_(largest_norm / norm * _ROUNDING_ROOM)
    return norm


def add_noise(total: Tensor, standard_deviation: float, generator: torch.Generator) -> None:
    """Add independent Gaussian noise of mean 0 to a sum of clipped updates, in place.

    Args:
        total: flat (num_values,) float32, on the generator's device.
        standard_deviation: noise multiplier times largest_norm, at least 0.
        generator: seeded from the system's entropy: whoever knows the seed can take the noise away.
    """
    for part in torch.split(total, _CHUNK):
        part.add_(torch.empty_like(part).normal_(0, standard_deviation, generator=generator))


def spent_epsilon(num_rounds: int, sampling_rate: float, noise_multiplier: float, delta: float) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy to adding or removing one client.

    Valid for a cohort that each client joins on its own with probability sampling_rate (Poisson sampling),
    and an update of any client of norm at most 1 / noise_multiplier of the noise. A cohort of fixed size
    is another mechanism; so is a sum divided by the number of clients that came.

    Args:
        num_rounds: rounds whose noisy sum was used, at least 0.
        sampling_rate: 0 to 1; at 1 this is the plain Gaussian mechanism.
        noise_multiplier: standard deviation of the noise over largest_norm, at least 0.
        delta: above 0, below 1; well below 1 / num_clients.

    Returns:
        An upper bound; 0 after no round, inf without noise.

    Raises:
        ConfigError: if dp-accounting is not installed.

    References:
        Abadi et al. 2016, arXiv 1607.00133; Mironov, Renyi differential privacy, arXiv 1702.07476; of the
        sampled Gaussian mechanism: Mironov, Talwar, Zhang, arXiv 1908.10530.
    """
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise ConfigError(
            "counting privacy must have the package dp-accounting, got an environment without it; "
            "install it: pip install 'mpifedlora[privacy]'"
        ) from error
    if num_rounds == 0:
        return 0.0
    accountant = RdpAccountant(_orders(sampling_rate, noise_multiplier))
    accountant.compose(PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier)), num_rounds)
    return float(accountant.get_epsilon(delta))


def _orders(sampling_rate: float, noise_multiplier: float) -> list[float]:
    # Any set of orders gives a valid bound. At sampling rates below 1 the library sums a series that is
    # slow for fractions below 2, and below 3 under strong noise: it then warns and drops them. There the
    # best order is that small only where epsilon is beyond use.
    if sampling_rate == 1:
        lowest = 1.25
    else:
        lowest = 2 if noise_multiplier <= 8 else 3
    quarters = [quarter / 4 for quarter in range(round(4 * lowest), 44)]
    return [*quarters, *_LARGE_ORDERS]
