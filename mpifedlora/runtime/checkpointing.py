"""Checkpoints while a run goes on, and what a resumed run starts from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpifedlora.core.config import RunConfig
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.snapshot import Snapshot, history, model_state, restore, take
from mpifedlora.errors import CheckpointError
from mpifedlora.io.checkpoints import CheckpointStore, decode, encode
from mpifedlora.io.client_store import ClientStore
from mpifedlora.runtime.server import Server
from mpifedlora.training.models import FederatedModel

_WEIGHT = "weight."


def snapshot(server: Server, config: RunConfig) -> Snapshot:
    """Copy all that a run needs to go on after its last finished round."""
    taken, model = take(server.coordinator), server.model
    taken.numbers.update(config=config.model_dump(mode="json"), built_in=model.built_in)
    taken.tensors["past"] = torch.stack(server.past)
    if server.coordinator.switches.aggregator.folds:
        weights = model.adapted_weights().items()
        taken.tensors.update({f"{_WEIGHT}{name}": weight.clone() for name, weight in weights})
    return taken


@dataclass(frozen=True)
class Resumption:
    """What a checkpoint holds, for every process.

    Args:
        numbers: by name.
        tensors: by name.
    """

    numbers: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @staticmethod
    def read(content: bytes) -> Resumption:
        """Read the bytes of a checkpoint.

        Raises:
            CheckpointError: see `mpifedlora.io.checkpoints.decode`.
        """
        return Resumption(*decode(content))

    def past(self, num_modules: int) -> list[RoundPlan]:
        """Return the plans of all finished rounds."""
        return [RoundPlan.unpack(packed.numpy(), num_modules) for packed in self.tensors["past"]]

    def recover(self, model: FederatedModel) -> None:
        """Make a model as it was when the checkpoint was taken.

        Raises:
            CheckpointError: if the checkpoint does not fit the model.
        """
        shapes, tensors = model.shapes, self.tensors
        weights = {name: tensor for name, tensor in tensors.items() if name.startswith(_WEIGHT)}
        named = {name.removeprefix(_WEIGHT): tensor for name, tensor in weights.items()}
        with _fitting():
            state = model_state(tensors, shapes)
            model.recover(history(tensors, shapes), state, named, int(self.numbers["built_in"]))

    def restore(self, server: Server) -> None:
        """Make a server go on where the checkpoint was taken.

        Raises:
            CheckpointError: if the checkpoint does not fit the model or the method.
        """
        with _fitting():
            restore(server.coordinator, Snapshot(dict(self.numbers), dict(self.tensors)))
            server.count(self.past(len(server.coordinator.shapes.modules)))


@contextmanager
def _fitting() -> Iterator[None]:
    """Turn what goes wrong with a checkpoint's content into one error."""
    try:
        yield
    # What numpy and torch say of other sizes has no common base.
    except Exception as error:
        raise CheckpointError(
            f"a checkpoint must fit the run's model and method, got {error}; resume with the run file, "
            "model and version that it was written with"
        ) from error


class Checkpointer:
    """Writes checkpoints beside the rounds, one at a time, and keeps the clients' states they need.

    Args:
        store: of the run.
        client_states: whose older versions are removed once no checkpoint needs them.
        keep: how many checkpoints stay.
        state_rounds: by client id, the versions that a resumed run's checkpoint needs.
    """

    def __init__(
        self, store: CheckpointStore, client_states: ClientStore, keep: int, state_rounds: Sequence[int] = ()
    ) -> None:
        self._store, self._client_states = store, client_states
        self._needed: deque[Sequence[int]] = deque([state_rounds] if state_rounds else [], maxlen=keep)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, round_num: int, taken: Snapshot) -> None:
        """Begin to write a checkpoint; the one before is waited for.

        Raises:
            CheckpointError: if that one could not be written; this one is begun all the same.
        """
        try:
            self.settle()
        finally:
            self._writing = self._thread.submit(self._write, round_num, taken)

    def settle(self) -> None:
        """Wait until what was begun is on disk.

        Raises:
            CheckpointError: if the disk refuses.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, round_num: int, taken: Snapshot) -> None:
        self._store.write(round_num, encode(*taken))
        self._needed.append(taken.numbers["state_rounds"])
        for client_id, versions in enumerate(zip(*self._needed, strict=True)):
            # 0: nothing is kept. A round that has begun since may have written its version already.
            oldest = min((version for version in versions if version), default=round_num + 1)
            self._client_states.remove_before(client_id, oldest)
