"""How fast this machine is at a run: some real local steps of the real model on the run's own examples."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mpifedlora.core.aggregation import ModuleSum, decompose
from mpifedlora.core.config import RunConfig
from mpifedlora.core.layout import Factors, LinearShape
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import UPDATE_HEADER, WireFormat
from mpifedlora.errors import TrainingError
from mpifedlora.io.scratch import scratch_folder
from mpifedlora.io.tables import Examples
from mpifedlora.runtime import setup
from mpifedlora.runtime.data import FederatedData, SharedData
from mpifedlora.runtime.evaluation import Evaluation
from mpifedlora.runtime.setup import Replica
from mpifedlora.runtime.worker import Worker
from mpifedlora.transport.base import own_cores

TIMED_STEPS, TIMED_BATCHES = 3, 2
LARGEST_S = 4.0
"""Seconds of a first step after which no more than one is timed."""


@dataclass(frozen=True)
class Speed:
    """What was measured, and what follows from it.

    Args:
        device: and threads of the process that measured.
        threads: of its CPU.
        num_cores: of this machine that it may run on.
        steps: by scope, pairs of (mean rank, seconds of a local step), in rising ranks.
        num_steps: that were timed.
        evaluate_s: of one whole measurement, from some batches of it.
        num_evaluated: examples that were measured for it.
        aggregate_s: of one round's SVDs at the full rank, from one module of each shape.
        load: processes that wanted a core of this machine in the last minute, on average.
    """

    device: str
    threads: int
    num_cores: int
    steps: dict[str, list[tuple[float, float]]]
    num_steps: int
    evaluate_s: float
    num_evaluated: int
    aggregate_s: float
    load: float

    @property
    def is_disturbed(self) -> bool:
        """Whether others wanted this machine's cores too."""
        return self.load > self.num_cores + 0.5

    def step_s(self, scope: str, lora_rank: float) -> float:
        """Return the seconds of a local step; between the ranks measured, on the line between them."""
        ranks, seconds = zip(*self.steps[scope], strict=True)
        return float(np.interp(lora_rank, ranks, seconds))


def calibrate(
    config: RunConfig,
    data: FederatedData,
    switches: Switches,
    plans: Sequence[RoundPlan],
    num_workers: int,
) -> Speed:
    """Time a run's local steps, its measurement and its SVDs on this machine.

    Each scope of the run is timed at its highest and its lowest rank.

    Args:
        config: of the run.
        data: its examples, some of which are used.
        switches: of the method.
        plans: of its rounds.
        num_workers: of the run; without `training.threads` they would share this machine's cores.

    Raises:
        TrainingError: if a step fails.
    """
    num_cores = len(own_cores())
    threads = setup.choose_threads(config.training.threads, num_cores, num_workers + 1)
    device = setup.choose_device(config.training.device, setup.num_visible_gpus(), 0, 1)
    setup.configure_torch(threads, device, is_deterministic=config.federation.reproducible)
    with scratch_folder() as folder:
        sample = _sample(config, data)
        replica = setup.build_replica(config, sample, device, folder)
        timer = _StepTimer(replica, switches.wire)
        scopes = dict.fromkeys(plan.scope for plan in plans)
        steps = {scope: timer.points([one for one in plans if one.scope == scope]) for scope in scopes}
        evaluate_s, num_evaluated = _time_evaluation(config, data, replica, timer.plan)
    return Speed(
        device=setup.describe_device(device, threads),
        threads=threads if device == "cpu" else 0,
        num_cores=num_cores,
        steps=steps,
        num_steps=timer.num_steps,
        evaluate_s=evaluate_s,
        num_evaluated=num_evaluated,
        aggregate_s=_time_svds(switches, plans, replica),
        load=os.getloadavg()[0],
    )


def _sample(config: RunConfig, data: FederatedData) -> FederatedData:
    generator, dataset = numpy_generator(config.federation.seed, "calibration"), data.dataset
    num_train = (1 + TIMED_STEPS) * config.training.batch_size
    owned = data.owned()
    train = owned.take(np.sort(generator.permutation(len(owned))[:num_train]))
    num_test = TIMED_BATCHES * config.evaluation.batch_size

    def some(examples: Examples) -> Examples:
        return examples.take(np.sort(generator.permutation(len(examples))[:num_test]))

    smaller = replace(
        dataset,
        train=train,
        validation=some(data.owned("validation")),
        test=some(data.owned("test")),
        owners=None,
    )
    return SharedData(smaller, [np.arange(len(train))])


class _StepTimer:
    """Times local steps as a worker makes them.

    Args:
        replica: of the run, with some of its examples, all of one client.
        wire: what messages and updates are sent as.
    """

    def __init__(self, replica: Replica, wire: WireFormat) -> None:
        self.replica, self.wire = replica, wire
        self.num_steps = self._round_num = 0
        self.plan: RoundPlan

    def points(self, plans: Sequence[RoundPlan]) -> list[tuple[float, float]]:
        """Return (mean rank, seconds of a step) at the lowest and at the highest rank of some plans."""
        by_rank = {sum(plan.lora_ranks) / len(plan.lora_ranks): plan for plan in plans}
        if plans[0].scope == "full":
            by_rank = {0.0: plans[0]}
        return [(r, self._step_s(by_rank[r])) for r in sorted({min(by_rank), max(by_rank)})]

    def _step_s(self, plan: RoundPlan) -> float:
        first_s = self._train_s(plan, 1)  # buffers, tokens and kernels are made
        if first_s > LARGEST_S:
            self.num_steps += 1
            return first_s
        self.num_steps += TIMED_STEPS
        return self._train_s(plan, TIMED_STEPS) / TIMED_STEPS

    def _train_s(self, plan: RoundPlan, num_steps: int) -> float:
        settings = replace(self.replica.settings, local_steps=num_steps, local_epochs=None)
        worker = Worker(0, 1, replace(self.replica, settings=settings), self.wire)
        self._round_num += 1
        self.plan = replace(
            plan,
            round_num=self._round_num,
            workers=(0,),
            frozen_ranks=(0,) * len(plan.lora_ranks),
            mapped_ranks=(),
            client_ranks=(),
            state_rounds=(0,) if plan.state_rounds else (),
            sends_base=False,
            sends_state=False,
            reduces=False,
        )
        worker.receive(self.plan, torch.empty(0, dtype=torch.uint8))
        header = worker.train().headers.view(UPDATE_HEADER).reshape(-1)[0]
        if header["fault"]:
            raise TrainingError(
                f"a local step must work on this machine, got a failure (standard error says which; rank "
                f"{max(plan.lora_ranks)}, {plan.scope}); mend it, or plan with --no-calibrate"
            )
        return float(header["train_s"])


def _time_evaluation(
    config: RunConfig, data: FederatedData, replica: Replica, plan: RoundPlan
) -> tuple[float, int]:
    num_held_out = len(data.owned(config.evaluation.split))
    num_examples = min(num_held_out, config.evaluation.max_examples or num_held_out)
    assert isinstance(replica.evaluation, Evaluation), "the sample is one that all see"
    replica.evaluation.batches  # noqa: B018 (tokenised before the clock runs)
    started = time.perf_counter()
    measured = len(replica.evaluation.predictions(replica.model, plan))
    return (time.perf_counter() - started) * num_examples / max(1, measured), measured


def _time_svds(switches: Switches, plans: Sequence[RoundPlan], replica: Replica) -> float:
    """Return the seconds of the SVDs of one round's sums, if the method takes any."""
    plan = next((one for one in plans if one.scope == "adapter"), None)
    if plan is None or switches.aggregator.active != "svd":
        return 0.0
    modules = list(zip(replica.model.shapes.modules, plan.lora_ranks, strict=True))
    alike: dict[tuple[int, int, int], int] = {}
    for module, lora_rank in modules:
        key = module.out_features, module.in_features, lora_rank
        alike[key] = alike.get(key, 0) + 1
    num_clients = max(1, max(len(one.cohort) for one in plans))
    return sum(number * _svd_s(switches, key, num_clients) for key, number in alike.items())


def _svd_s(switches: Switches, sizes: tuple[int, int, int], num_clients: int) -> float:
    module, lora_rank = LinearShape("", *sizes[:2]), sizes[2]
    clients = [
        Factors(torch.randn(lora_rank, module.in_features), torch.randn(module.out_features, lora_rank))
        for _ in range(num_clients)
    ]
    one = ModuleSum(clients, [1 / num_clients] * num_clients, switches.aggregator)
    started = time.perf_counter()
    decompose([one], [lora_rank], switches.device)
    one.cut(lora_rank, lora_rank)
    return time.perf_counter() - started
