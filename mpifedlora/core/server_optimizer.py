"""The server's optimiser: a step made of the aggregated update, and its state carried through rank cuts.

The aggregated state minus the old one is taken for a descent direction; momentum and Adam's kin then run
on the server. Factor space must keep its basis from round to round: so for the whole model, for a fixed A,
and for means of the factors, where a cut is a known linear map. State is flat float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.layout import AdapterLayout, Factors
from mpifedlora.core.lowrank import INITIAL_ROW_NORM, Svd

# Of the largest singular value. Below it U, which is float32, holds noise in place of a direction.
SMALLEST_SINGULAR_VALUE = 1e-6


def _adagrad(second: Tensor, update: Tensor, beta2: float) -> None:
    second.addcmul_(update, update)


def _adam(second: Tensor, update: Tensor, beta2: float) -> None:
    second.mul_(beta2).addcmul_(update, update, value=1 - beta2)


def _yogi(second: Tensor, update: Tensor, beta2: float) -> None:
    sign = torch.addcmul(second, update, update, value=-1).sign_()
    second.addcmul_(sign.mul_(update), update, value=beta2 - 1)


# How the adaptive kinds move the second moment.
SECOND_MOMENTS: Mapping[str, Callable[[Tensor, Tensor, float], None]] = {
    "fedadagrad": _adagrad,
    "fedadam": _adam,
    "fedyogi": _yogi,
}


@dataclass(frozen=True)
class ServerOptimizer:
    """Which step the server takes.

    Args:
        kind: `momentum`, `fedadagrad`, `fedadam` or `fedyogi`.
        learning_rate: eta, above 0; `momentum` with 1 and beta1 0 is FedAvg.
        beta1: decay of the first moment, 0 to below 1.
        beta2: decay of the second moment, 0 to below 1; `fedadam` and `fedyogi` read it.
        tau: least denominator, above 0; `momentum` does not read it.

    References:
        FedOpt, arXiv 2003.00295, algorithm 2; momentum: FedAvgM, arXiv 1909.06335.
    """

    kind: str
    learning_rate: float
    beta1: float
    beta2: float
    tau: float


@dataclass
class Moments:
    """What the server remembers of past updates.

    Args:
        first: running mean (`momentum`: decayed sum) of updates (num_values,) float32.
        second: running size of squared updates (num_values,) float32, not negative; (0,) for `momentum`.
    """

    first: Tensor
    second: Tensor


def initial_moments(num_values: int, optimizer: ServerOptimizer) -> Moments:
    """Return the moments before the first update: 0, and tau^2, the least that FedOpt's analysis allows."""
    num_second = num_values if optimizer.kind in SECOND_MOMENTS else 0
    return Moments(torch.zeros(num_values), torch.full((num_second,), optimizer.tau**2))


def server_step(optimizer: ServerOptimizer, moments: Moments, update: Tensor) -> Tensor:
    """Return what is to be added to the old state; the moments are updated in place.

    `momentum`: m = beta1 m + update, step = eta m. The adaptive kinds: m = beta1 m + (1 - beta1) update,
    then v by its kind, step = eta m / (sqrt(v) + tau). There is no bias correction.

    Args:
        optimizer: kind and constants.
        moments: of the same length as the update.
        update: aggregated state minus old state (num_values,) float32, finite; left as it is.

    References:
        FedOpt, arXiv 2003.00295, algorithm 2.

    >>> optimizer = ServerOptimizer("momentum", learning_rate=0.5, beta1=0.9, beta2=0.0, tau=0.0)
    >>> moments = initial_moments(1, optimizer)
    >>> [server_step(optimizer, moments, torch.tensor([2.0])).item() for _ in range(2)]
    [1.0, 1.899999976158142]
    """
    eta, beta1 = optimizer.learning_rate, optimizer.beta1
    if optimizer.kind == "momentum":
        return moments.first.mul_(beta1).add_(update) * eta
    moments.first.mul_(beta1).add_(update, alpha=1 - beta1)
    SECOND_MOMENTS[optimizer.kind](moments.second, update, optimizer.beta2)
    step = moments.second.sqrt().add_(optimizer.tau)
    return torch.div(moments.first, step, out=step).mul_(eta)


class CutMap(NamedTuple):
    """A cut of one module as a linear map of its factors: A' = a @ A, B' = B @ b.

    `a` (new_rank, old_rank), `b` (old_rank, new_rank), float32.
    """

    a: Tensor
    b: Tensor


class Cut(NamedTuple):
    """How a cut mapped the factors, before the round that it opened."""

    round_num: int
    before: AdapterLayout
    after: AdapterLayout
    maps: list[CutMap]


def cut_map(mean: Factors, svd: Svd, lora_rank: int) -> CutMap:
    """Return the map from mean factors to the leading directions of their product.

    With B A = U S V^T and c the row norm that `lowrank.factors_of` gives to A', A' = c V^T = (c S^-1 U^T B) A
    and B' = U S / c = B (A V / c), for the first lora_rank directions. A direction without singular value
    has no past: its row and column are 0.

    Args:
        mean: factors before the cut, `a` (old_rank, in) and `b` (out, old_rank).
        svd: `svd_of_product(mean)`.
        lora_rank: rank after the cut, 0 to the number of singular values.
    """
    u, s, v = svd.u[:, :lora_rank].double(), svd.s[:lora_rank], svd.vt[:lora_rank].double().mT
    has_past = s > SMALLEST_SINGULAR_VALUE * svd.s[:1]
    inverse = torch.where(has_past, 1 / s, 0.0)
    a = INITIAL_ROW_NORM * inverse[:, None] * (u.mT @ mean.b.double())
    b = (mean.a.double() @ v) * has_past / INITIAL_ROW_NORM
    return CutMap(a.float(), b.float())


def carry(moments: Moments, before: AdapterLayout, after: AdapterLayout, maps: Sequence[CutMap]) -> Moments:
    """Return the moments of the factors after a cut.

    The first moment is a displacement of the factors and moves as they do: m -> P m. The second is one
    of variances, and without the covariances they move by the squared entries: v -> (P*P) v, never negative.
    A row of zeros leaves v = 0, without a floor of tau^2: tau in the denominator already bounds the step,
    m is 0 there too, and v fades below tau^2 in `fedadam` and `fedyogi` anyway.

    Args:
        moments: of the old layout; an empty second moment stays empty.
        before: layout of the old state.
        after: layout of the new one: the same parts and tensors at the maps' new ranks.
        maps: one a module, identities where the rank stays.
    """
    first = _mapped(moments.first, before, after, maps)
    if not moments.second.numel():
        return Moments(first, moments.second)
    squares = [CutMap(one.a.square(), one.b.square()) for one in maps]
    return Moments(first, _mapped(moments.second, before, after, squares))


def carry_variate(
    variate: Tensor, before: AdapterLayout, after: AdapterLayout, maps: Sequence[CutMap]
) -> Tensor:
    """Return a control variate after a cut: it lives in gradient space, so the transposed maps move it.

    With G the gradient by B @ A, dL/dA = B^T G and dL/dB = G A^T. At B' = B b and A' = a A they are
    B'^T G = b^T (dL/dA) and G A'^T = (dL/dB) a^T: so c_A' = b^T c_A and c_B' = c_B a^T. That is exact
    where the cut leaves the function as it is (no energy lost, or what is cut is frozen).

    Args:
        variate: a client's, or the server's (num_values of `before`,) float32.
        before: layout of the old state.
        after: layout of the new one: the same parts and tensors at the maps' new ranks.
        maps: one a module, identities where the rank stays.

    References:
        SCAFFOLD, arXiv 1910.06378, for what a variate is; the rule is the chain rule.
    """
    return _mapped(variate, before, after, [CutMap(one.b.mT, one.a.mT) for one in maps])


def _mapped(flat: Tensor, before: AdapterLayout, after: AdapterLayout, maps: Sequence[CutMap]) -> Tensor:
    mapped = flat.new_empty(after.num_values)
    for old, new, (a, b) in zip(before.factors(flat), after.factors(mapped), maps, strict=True):
        # addmm_ refuses a shape that does not fit; out= would resize the view.
        if "a" in after.parts:
            new.a.addmm_(a, old.a, beta=0)
        if "b" in after.parts:
            new.b.addmm_(old.b, b, beta=0)
    after.whole_values(mapped).copy_(before.whole_values(flat))
    return mapped
