"""The worker with played training: what it writes into rows, keeps, adds up, and when it asks for data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.wire import SummedRows, UpdateRows, WireFormat, read_headers
from mpifedlora.errors import CheckpointError, TrainingError
from mpifedlora.runtime import worker as worker_module
from mpifedlora.runtime.worker import Worker, serve
from mpifedlora.training.local import DeadlinePassed, LocalResult

SHAPES = ModelShapes((LinearShape("q", 2, 1),), (TensorShape("head", (1,)),), ())
# Rank 1: A has 1 value, B 2, the head 1.
STATE = torch.tensor([1.0, 2.0, -4.0, 8.0])
NUM_EXAMPLES = {0: 10, 1: 1, 2: 3}


class Model:
    """Holds what it received."""

    shapes = SHAPES
    device = torch.device("cpu")

    def receive(self, plan: RoundPlan, message: Tensor) -> None:
        self.state = plan.split(SHAPES, message).state


class Memory:
    """Keeps in a dictionary, by client."""

    def __init__(self, **kept: Tensor) -> None:
        self.before = kept
        self.kept: dict[int, dict[str, Tensor]] = {}

    def recall(self, plan: RoundPlan, client_id: int) -> dict[str, Tensor]:
        return self.before

    def keep(self, plan: RoundPlan, client_id: int, state: dict[str, Tensor]) -> None:
        self.kept[client_id] = {name: tensor.clone() for name, tensor in state.items()}


@dataclass
class Setting:
    """A worker whose clients all change the state by `change`, in two steps of a second each."""

    monkeypatch: pytest.MonkeyPatch
    failing: dict[int, BaseException] = field(default_factory=dict)
    clock_s: float = 100.0
    asked: list[int] = field(default_factory=list)
    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def worker(
        self, change: Tensor, wire: WireFormat | None = None, memory: Memory | None = None, **options: Any
    ) -> Worker:
        def train(*arguments: Any) -> LocalResult:
            model, _, _, _, _, client_id, values, kept, is_late = arguments
            self.seen.append(dict(kept))
            values.fill_(torch.nan)  # as a step may leave them
            for _ in range(2):
                if is_late():
                    raise DeadlinePassed
                self.clock_s += 1
            if client_id in self.failing:
                raise self.failing[client_id]
            torch.add(model.state, change[client_id] if change.dim() == 2 else change, out=values)
            is_finite = bool(values.isfinite().all())
            return LocalResult(5, 0.5 + client_id, 0.25, is_finite, {"own": values[:1].clone()})

        self.monkeypatch.setattr(worker_module, "train_client", train)
        clock = SimpleNamespace(perf_counter=lambda: self.clock_s)
        self.monkeypatch.setattr(worker_module, "time", clock)
        replica: Any = SimpleNamespace(
            model=Model(), task=None, settings=None, memory=memory or Memory(), examples_of=self.examples_of
        )
        return Worker(0, 2, replica, wire or WireFormat(), **options)

    def examples_of(self) -> Callable[[int], range]:
        def take(client_id: int) -> range:
            self.asked.append(client_id)
            return range(NUM_EXAMPLES[client_id])

        return take


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(monkeypatch)


def plan_of(*workers: int, **changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {"round_num": 2, "stage": "annealing", "scope": "adapter", "sends_state": True}
    return RoundPlan(lora_ranks=(1,), frozen_ranks=(0,), workers=workers, **(fields | changes))


def bytes_of(values: Tensor) -> Tensor:
    """The bytes of a message, padded to whole units."""
    wire = torch.zeros(64, dtype=torch.uint8)
    wire[: 4 * len(values)] = values.view(torch.uint8)
    return wire


def train(worker: Worker, plan: RoundPlan) -> UpdateRows:
    worker.receive(plan, bytes_of(STATE))
    return worker.train()


def values_of(rows: UpdateRows, index: int) -> list[float]:
    return rows.wire(index).view(torch.float32).tolist()


class TestExactRows:
    def test_a_row_is_what_the_client_trained(self, setting: Setting) -> None:
        changes = torch.arange(12.0).view(3, 4)
        rows = train(setting.worker(changes), plan_of(0, 1, 0))
        assert len(rows) == 2
        assert values_of(rows, 0) == (STATE + changes[0]).tolist()
        assert values_of(rows, 1) == (STATE + changes[2]).tolist()

    def test_the_header_says_who_trained_on_what(self, setting: Setting) -> None:
        rows = train(setting.worker(torch.zeros(4)), plan_of(0, 1, 0))
        names = ("round_num", "client_id", "num_examples", "num_steps", "train_loss", "penalty", "num_bytes")
        header = rows.header(1)
        assert [header[name].item() for name in names] == [2, 2, 3, 5, 2.5, 0.25, 16]
        assert header["is_finite"] == 1
        assert header["train_s"] >= 0

    def test_values_that_are_no_numbers_are_told(self, setting: Setting) -> None:
        rows = train(setting.worker(torch.tensor([0.0, torch.nan, 0.0, 0.0])), plan_of(0))
        assert rows.header(0)["is_finite"] == 0

    def test_the_buffer_is_used_again_where_it_fits(self, setting: Setting) -> None:
        worker = setting.worker(torch.ones(4))
        first, again, other = (train(worker, plan_of(*who)) for who in ([0, 0, 1], [0, 1, 0], [0, 1, 1]))
        assert first is again
        assert other is not first

    def test_only_what_training_keeps_is_kept(self, setting: Setting) -> None:
        memory = Memory()
        train(setting.worker(torch.ones(4), memory=memory), plan_of(0, 0))
        assert {client: list(kept) for client, kept in memory.kept.items()} == {0: ["own"], 1: ["own"]}


# bfloat16 has 8 bits: 1 + 2**-9 is rounded to 1, and 2**-9 is lost. Steps of 1/4 stay whole.
FINE = 2.0**-9
CHANGE = torch.tensor([1 + FINE, 0.25, -0.5, 0.0])


class TestRoundedRows:
    wire = WireFormat("bfloat16", has_feedback=True)

    def sent(self, rows: UpdateRows, index: int = 0) -> list[float]:
        changes: list[float] = rows.wire(index).view(torch.bfloat16).tolist()
        return changes

    def test_a_row_is_the_rounded_change(self, setting: Setting) -> None:
        memory = Memory()
        rows = train(setting.worker(CHANGE, self.wire, memory), plan_of(0))
        assert rows.sizes == (8,)
        assert self.sent(rows) == [1.0, 0.25, -0.5, 0.0]
        assert rows.header(0)["num_bytes"] == 8
        assert memory.kept[0]["lost"].tolist() == [FINE, 0, 0, 0]
        assert memory.kept[0]["own"].tolist() == [2 + FINE]  # with what training keeps

    def test_without_feedback_what_is_lost_is_lost(self, setting: Setting) -> None:
        memory = Memory(lost=torch.full((4,), 2.0))
        rows = train(setting.worker(torch.zeros(4), WireFormat("bfloat16"), Memory()), plan_of(0))
        assert self.sent(rows) == [0, 0, 0, 0]
        train(setting.worker(CHANGE, WireFormat("bfloat16"), memory), plan_of(0))
        assert list(memory.kept[0]) == ["own"]

    def test_what_was_lost_is_added_to_the_next_change(self, setting: Setting) -> None:
        memory = Memory(lost=torch.tensor([FINE, 0, 0.5, 0]))
        rows = train(setting.worker(CHANGE, self.wire, memory), plan_of(0))
        # 1 + 2 * 2**-9 = 1 + 2**-8 lies half way between 1 and 1 + 2**-7: to even, 1.
        assert self.sent(rows) == [1.0, 0.25, 0.0, 0.0]
        assert memory.kept[0]["lost"].tolist() == [2 * FINE, 0, 0, 0]
        assert list(setting.seen[0]) == ["lost"]

    def test_a_cut_begins_anew(self, setting: Setting) -> None:
        memory = Memory(lost=torch.full((7,), 2.0))  # of a higher rank
        rows = train(setting.worker(CHANGE, self.wire, memory), plan_of(0))
        assert self.sent(rows) == [1.0, 0.25, -0.5, 0.0]
        assert memory.kept[0]["lost"].tolist() == [FINE, 0, 0, 0]

    def test_int8_rounds_by_seed_round_and_client(self, setting: Setting) -> None:
        half = torch.tensor([0.0, 127.0, 0.5, 0.0])  # B's scale is 1: its 0.5 is rounded up or down

        def sent(seed: int, round_num: int) -> list[int]:
            worker = setting.worker(half, WireFormat("int8", seed=seed))
            rows = train(worker, plan_of(0, 0, 0, round_num=round_num))
            # Scales of A and B, A, and B's first value come before.
            return [int(rows.wire(index)[10]) for index in range(3)]

        runs = [[sent(seed, round_num) for round_num in range(1, 9)] for seed in (3, 3, 4)]
        assert runs[0] == runs[1] != runs[2]
        by_client = list(zip(*runs[0], strict=True))
        assert len(set(by_client)) == 3
        assert all(set(values) == {0, 1} for values in by_client)

    def test_a_message_is_decoded_before_the_model_takes_it(self, setting: Setting) -> None:
        worker = setting.worker(torch.zeros(4), WireFormat("float32", "bfloat16"))
        message = torch.zeros(64, dtype=torch.uint8)
        message[:8] = STATE.bfloat16().view(torch.uint8)
        worker.receive(plan_of(0), message)
        assert values_of(worker.train(), 0) == STATE.tolist()


class TestSummedRows:
    plan = plan_of(0, 0, 0, reduces=True)
    changes = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, torch.inf, 0]])

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize(("counts_examples", "counts"), [(True, (10, 1)), (False, (1, 1))])
    def test_the_sum_is_of_what_is_finite(
        self, setting: Setting, dtype: str, counts_examples: bool, counts: tuple[int, int]
    ) -> None:
        worker = setting.worker(self.changes, reduce_dtype=dtype, counts_examples=counts_examples)
        rows = train(worker, self.plan)
        assert isinstance(rows, SummedRows)
        assert rows.total.dtype == getattr(torch, dtype)
        expected = sum(counts) * STATE + counts[0] * self.changes[0] + counts[1] * self.changes[1]
        assert rows.total.tolist() == expected.tolist()
        assert [int(rows.header(index)["is_finite"]) for index in range(3)] == [1, 1, 0]

    def test_every_round_begins_at_zero(self, setting: Setting) -> None:
        worker = setting.worker(self.changes)
        first = train(worker, self.plan).total.tolist()
        assert train(worker, self.plan).total.tolist() == first

    def test_without_clients_the_sum_is_zero(self, setting: Setting) -> None:
        rows = train(setting.worker(self.changes), plan_of(1, -1, 1, reduces=True))
        assert len(rows) == 0
        assert rows.total.tolist() == [0, 0, 0, 0]


def faults_of(rows: UpdateRows, plan: RoundPlan) -> list[str]:
    clients = plan.clients_of(0)
    return [header.fault for header in read_headers(rows.headers, plan, clients, rows.sizes)]


class TestFailures:
    plan = plan_of(0, 0, 0)

    def test_a_client_that_raises_is_told_and_the_others_go_on(
        self, setting: Setting, capsys: pytest.CaptureFixture[str]
    ) -> None:
        memory = Memory()
        setting.failing[1] = RuntimeError("out of memory\nand a second line")
        rows = train(setting.worker(torch.ones(4), memory=memory), self.plan)
        assert faults_of(rows, self.plan) == ["", "failed", ""]
        assert [values_of(rows, index) for index in (0, 1, 2)] == [
            (STATE + 1).tolist(),
            [0, 0, 0, 0],
            (STATE + 1).tolist(),
        ]
        assert list(memory.kept) == [0, 2]
        told = "worker 0 failed in round 2 on client 1: RuntimeError: out of memory\n"
        assert capsys.readouterr().err == told

    def test_its_header_counts_nothing_but_the_time(self, setting: Setting) -> None:
        setting.failing[1] = MemoryError()
        rows = train(setting.worker(torch.ones(4)), self.plan)
        (_, header, _) = read_headers(rows.headers, self.plan, (0, 1, 2), rows.sizes)
        assert (header.num_examples, header.num_steps, header.train_s) == (0, 0, 2.0)
        assert not header.is_finite
        assert header.train_loss != header.train_loss

    def test_it_trains_again_in_the_next_round(self, setting: Setting) -> None:
        setting.failing[1] = RuntimeError("once")
        worker = setting.worker(torch.ones(4))
        train(worker, self.plan)
        del setting.failing[1]
        rows = train(worker, self.plan)
        assert faults_of(rows, self.plan) == ["", "", ""]
        assert values_of(rows, 1) == (STATE + 1).tolist()

    @pytest.mark.parametrize("wire", ["bfloat16", "int8"])
    def test_a_rounded_row_is_zeros_too(self, setting: Setting, wire: str) -> None:
        worker = setting.worker(torch.ones(4), WireFormat(wire))
        assert train(worker, self.plan).wire(1).any()
        setting.failing[1] = RuntimeError("now")
        rows = train(worker, self.plan)
        assert rows.wire(0).any()
        assert not rows.wire(1).any()

    def test_it_is_in_no_sum(self, setting: Setting) -> None:
        setting.failing[1] = RuntimeError("no")
        plan = plan_of(0, 0, 0, reduces=True)
        rows = train(setting.worker(torch.ones(4)), plan)
        assert rows.total.tolist() == ((10 + 3) * (STATE + 1)).tolist()
        assert faults_of(rows, plan) == ["", "failed", ""]

    @pytest.mark.parametrize("what", ["recall", "keep"])
    def test_a_state_that_cannot_be_read_or_kept_is_its_failure(
        self, setting: Setting, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        memory = Memory()
        plain = getattr(memory, what)

        def refuse(plan: RoundPlan, client_id: int, *rest: Any) -> Any:
            if client_id == 0:
                raise CheckpointError("no space left")
            return plain(plan, client_id, *rest)

        monkeypatch.setattr(memory, what, refuse)
        rows = train(setting.worker(torch.ones(4), memory=memory), self.plan)
        assert faults_of(rows, self.plan) == ["failed", "", ""]
        assert values_of(rows, 0) == [0, 0, 0, 0]

    def test_what_is_no_failure_of_a_client_ends_the_worker(self, setting: Setting) -> None:
        setting.failing[1] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            train(setting.worker(torch.ones(4)), self.plan)

    def test_a_process_that_cannot_go_on_says_on_whom(
        self, setting: Setting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def settle(rows: UpdateRows, stop: int) -> None:
            raise RuntimeError("CUDA error")

        setting.failing[1] = RuntimeError("CUDA error")
        monkeypatch.setattr(UpdateRows, "settle", settle)
        with pytest.raises(TrainingError, match="worker 0 failed in round 2 on client 1: RuntimeError: CUDA"):
            train(setting.worker(torch.ones(4)), self.plan)


class TestDeadline:
    plan = plan_of(0, 0, 0)

    @pytest.mark.parametrize(
        ("deadline_s", "faults", "seconds"),
        [
            (None, ["", "", ""], [2, 2, 2]),
            (5.0, ["", "", ""], [2, 2, 2]),  # a step that has begun is finished
            (4.9, ["", "", "late"], [2, 2, 1]),
            (3.0, ["", "", "late"], [2, 2, 0]),
            (2.9, ["", "late", "late"], [2, 1, 0]),
            (0.5, ["late", "late", "late"], [1, 0, 0]),
        ],
    )
    def test_clients_in_training_or_waiting_are_late(
        self,
        setting: Setting,
        capsys: pytest.CaptureFixture[str],
        deadline_s: float | None,
        faults: list[str],
        seconds: list[float],
    ) -> None:
        memory = Memory()
        worker = setting.worker(torch.ones(4), memory=memory, round_deadline_s=deadline_s)
        for _ in range(2):  # every round has its own deadline
            rows = train(worker, self.plan)
            assert faults_of(rows, self.plan) == faults
            headers = read_headers(rows.headers, self.plan, (0, 1, 2), rows.sizes)
            assert [header.train_s for header in headers] == seconds
            for index, fault in enumerate(faults):
                assert values_of(rows, index) == ([0, 0, 0, 0] if fault else (STATE + 1).tolist())
            assert list(memory.kept) == [client_id for client_id in range(3) if not faults[client_id]]
        assert capsys.readouterr().err == ""


class Wire:
    """A worker's end that plays some plans."""

    worker_id, num_workers = 0, 2

    def __init__(self, *plans: RoundPlan) -> None:
        self.plans = list(plans)
        self.log: list[Any] = []

    def receive(self) -> tuple[RoundPlan, Tensor]:
        return self.plans.pop(0), bytes_of(STATE)

    def submit_predictions(self, predictions: Tensor) -> None:
        self.log.append("predictions")

    def submit(self, rows: UpdateRows) -> None:
        self.log.append(len(rows))


def test_a_worker_does_what_the_plans_say_until_one_says_stop(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = setting.worker(torch.zeros(4))
    monkeypatch.setattr(worker, "predictions", lambda: torch.zeros(1, 2))
    wire = Wire(
        plan_of(0, 1, 0),
        plan_of(1, 1, 1, evaluates=True),  # none of its clients: it answers all the same
        plan_of(-1, -1, -1),  # nobody trains: there is nothing to answer
        plan_of(0, 0, -1, evaluates=True),
        plan_of(0, 0, 0).stopped(),
    )
    serve(worker, wire)
    assert wire.log == [2, "predictions", 0, "predictions", 2]
    assert wire.plans == []
