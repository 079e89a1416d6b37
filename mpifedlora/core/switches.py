"""The switches of a method, as the core needs them: values made of small functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mpifedlora.core.aggregation import AGGREGATORS, Aggregator, weighted_mean
from mpifedlora.core.annealer import Guidance
from mpifedlora.core.lateness import staleness_weight
from mpifedlora.core.robust import Combiner
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.screening import Screening
from mpifedlora.core.server_optimizer import ServerOptimizer
from mpifedlora.core.server_update import GaussianNoise
from mpifedlora.core.wire import UpdateHeader, WireFormat


@dataclass(frozen=True)
class Switches:
    """A method.

    Args:
        schedule: rank budget and stages.
        learning_rate: of a round, given its number and scope.
        rate_exponent: see `schedule.rank_factor`.
        choose_workers: worker of each client of a round (by client id, or ABSENT), given its number
            and the clients that are set aside.
        max_failures: in a row, that set a client aside.
        initiating_scope: what the initiating stage trains, `adapter` or `full`.
        scope: what is trained after it: `adapter`, `full`, `b-only` or `alternating`.
        keeps_b: whether B stays with its client.
        keeps_head: whether the head stays too, then.
        has_variates: whether control variates correct the clients' drift (SCAFFOLD).
        num_eligible: clients that have examples; the control variate's mean is over all of them.
        client_ranks: rank that each client trains at most; none means no limit.
        aggregator: how adapters are combined.
        weights: `examples`, `equal` or `frobenius`.
        combiner: of the clients' values, or products: the weighted mean, or a robust one.
        optimizer: of the server, along the aggregated update; none takes the aggregate itself.
        noise: on the sum of updates, for privacy.
        screening: which updates are used.
        freezes: whether directions beyond the budget are frozen (else dropped).
        is_spectral: whether the budget goes to the strongest directions (else evenly to all modules).
        guidance: of measured schedules.
        mu: proximal weight of a round.
        wire: what messages and updates are sent as.
        late_exponent: of the weight of updates that come late; None where these are dropped.
        reduces: whether the workers add up their clients' updates on the way.
        device: where the server decomposes sums.
    """

    schedule: RankSchedule
    learning_rate: Callable[[int, str], float]
    choose_workers: Callable[[int, Sequence[int]], Sequence[int]]
    rate_exponent: float = 0.0
    max_failures: int = 3
    initiating_scope: str = "adapter"
    scope: str = "adapter"
    keeps_b: bool = False
    keeps_head: bool = False
    has_variates: bool = False
    num_eligible: int = 1
    client_ranks: tuple[int, ...] = ()
    aggregator: Aggregator = AGGREGATORS["product"]
    weights: str = "examples"
    combiner: Combiner = weighted_mean
    optimizer: ServerOptimizer | None = None
    noise: GaussianNoise | None = None
    screening: Screening = field(default_factory=Screening)
    freezes: bool = True
    is_spectral: bool = False
    guidance: Guidance = field(default_factory=Guidance)
    mu: Callable[[int], float] = lambda round_num: 0.0
    wire: WireFormat = field(default_factory=WireFormat)
    late_exponent: float | None = None
    reduces: bool = False
    device: str = "cpu"

    @property
    def client_keeps_state(self) -> bool:
        """Whether clients keep something between rounds, if only how far a late one has come."""
        return self.always_keeps_state or self.late_exponent is not None

    @property
    def always_keeps_state(self) -> bool:
        """Whether each client keeps something from every round that it takes part in."""
        return self.keeps_b or self.has_variates or self.wire.feeds_back

    @property
    def is_local(self) -> bool:
        """Whether one module's next values follow from that module's updates alone.

        Then a round can be finished in parts. What needs whole updates first is refused here: norms, Krum,
        spectral allocation, a cut that is tried; and what is not worth it: noise, control variates, folded
        residuals and stacks, clients' own ranks.
        """
        needs_norms = self.weights == "frobenius" or self.screening.compares
        is_cut_apart = not self.is_spectral and self.schedule.kind != "metropolis"
        is_plain = self.noise is None and not self.has_variates
        return is_plain and is_cut_apart and not (needs_norms or self.aggregator.folds or self.client_ranks)

    def counts(self, header: UpdateHeader) -> float:
        """Return what an update counts, as far as its header tells."""
        count = header.num_examples if self.weights == "examples" else 1
        if self.late_exponent is None or not header.staleness:
            return count
        return count * staleness_weight(header.staleness, self.late_exponent)

    def round_scope(self, round_num: int) -> str:
        """Return what a round trains: `adapter`, `full`, `a` or `b`."""
        if self.schedule.stage(round_num) == "initiating":
            return self.initiating_scope
        if self.scope == "alternating":
            # B first: as long as it is 0, A has no gradient.
            return "b" if (round_num - self.schedule.initiating_rounds) % 2 else "a"
        return "b" if self.scope == "b-only" else self.scope
