"""What the server does with flat updates: combine them, add noise, step along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpifedlora.core.aggregation import weighted_mean
from mpifedlora.core.layout import AdapterLayout
from mpifedlora.core.privacy import add_noise, clip
from mpifedlora.core.robust import Combiner
from mpifedlora.core.server_optimizer import (
    CutMap,
    Moments,
    ServerOptimizer,
    carry,
    initial_moments,
    server_step,
)


@dataclass(frozen=True)
class GaussianNoise:
    """Noise on the sum of clipped updates.

    Args:
        clip_norm: largest norm of one client's update.
        noise_multiplier: standard deviation of the noise on the sum, in units of clip_norm.
        expected_cohort: clients that take part in a round on average; the sum is divided by it, and
            not by those that came, so that nobody's presence changes the others' weight.
        generator: of the noise.
        is_fixed: whether its seed was given: then its state may be saved, and the noise drawn again.

    References:
        DP-FedAvg, arXiv 1710.06963, the estimator with a fixed denominator.
    """

    clip_norm: float
    noise_multiplier: float
    expected_cohort: float
    generator: torch.Generator
    is_fixed: bool = False


class FlatUpdate:
    """From the clients' flat values to the next ones; it keeps the moments of the server's optimiser.

    Args:
        combiner: of the values, `weighted_mean` or a robust one.
        optimizer: steps along the aggregated update; without one the aggregate itself is next.
        noise: for privacy.
    """

    def __init__(
        self,
        combiner: Combiner = weighted_mean,
        optimizer: ServerOptimizer | None = None,
        noise: GaussianNoise | None = None,
    ) -> None:
        self.combiner, self.optimizer, self.noise = combiner, optimizer, noise
        self.moments: Moments | None = None

    def advance(self, old: Tensor, values: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> Tensor:
        """Write the next values into `out`; without any client they stay, but for the noise.

        Args:
            old: (num_values,), what the clients started from.
            values: per client (num_values,).
            weights: one a client, summing to 1.
            out: (num_values,), overwritten and returned.
        """
        if self.noise is not None:
            self._noised_mean(old, values, self.noise, out)
        elif not values or not old.numel():
            return out.copy_(old)
        else:
            self.combiner(values, weights, out)
        if self.optimizer is not None:
            self._step(self.optimizer, old, out)
        return out

    def _noised_mean(self, old: Tensor, values: Sequence[Tensor], noise: GaussianNoise, out: Tensor) -> None:
        out.zero_()
        update = torch.empty_like(old)
        for value in values:
            torch.sub(value, old, out=update)
            clip(update, noise.clip_norm)  # clients have clipped: rounding, or a client that has not
            out.add_(update)
        add_noise(out, noise.noise_multiplier * noise.clip_norm, noise.generator)
        out.div_(noise.expected_cohort).add_(old)

    def _step(self, optimizer: ServerOptimizer, old: Tensor, out: Tensor) -> None:
        if self.moments is None or self.moments.first.numel() != old.numel():
            self.moments = initial_moments(old.numel(), optimizer)
        step = server_step(optimizer, self.moments, out.sub_(old))
        torch.add(old, step, out=out)

    def carry(self, before: AdapterLayout, after: AdapterLayout, maps: Sequence[CutMap]) -> None:
        """Take the moments through a cut of the rank, from one layout to another."""
        if self.moments is not None:
            self.moments = carry(self.moments, before, after, maps)
