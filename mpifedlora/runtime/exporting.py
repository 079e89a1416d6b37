"""What a run's model is written as, at its end or from one of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mpifedlora.core.aggregation import AGGREGATORS
from mpifedlora.core.config import RunConfig
from mpifedlora.core.history import Trained
from mpifedlora.core.layout import Factors
from mpifedlora.io.adapter_files import write_adapter, write_base_weights
from mpifedlora.io.model_files import hub_name
from mpifedlora.io.output_folder import ADAPTER_FOLDER, BASE_FOLDER, CLIENT_ADAPTERS_FOLDER
from mpifedlora.runtime.memory import Memory
from mpifedlora.training.models import FederatedModel

Adapter = tuple[list[Factors], list[Tensor]]


@dataclass(frozen=True)
class TrainedModel:
    """A model as the rounds so far have made it.

    Args:
        config: of the run.
        model: that has received what the server has sent.
        trained: the global state.
        memory: what clients have kept.
    """

    config: RunConfig
    model: FederatedModel
    trained: Trained
    memory: Memory

    @property
    def has_adapter(self) -> bool:
        """Whether there is a global adapter: not where the whole model is trained, or B stays at home."""
        return self.trained.plan.scope != "full" and not self.keeps_b

    @property
    def keeps_b(self) -> bool:
        """Whether each client has a B of its own."""
        return bool(self.trained.plan.keeps_b)

    @property
    def clients(self) -> list[int]:
        """Ids of the clients that have kept something."""
        return [client_id for client_id, kept in enumerate(self.trained.plan.state_rounds) if kept]

    def changed_weights(self) -> dict[str, Tensor]:
        """Return the base weights that differ from the pre-trained ones, by name."""
        changed = self.trained.base_weights()
        if AGGREGATORS[self.config.aggregation.kind].folds and self.trained.plan.scope != "full":
            changed.update(self.model.adapted_weights())
        return changed

    def adapter(self, client_id: int | None = None) -> Adapter:
        """Return the global adapter, or a client's own: the global A and head with its B."""
        if client_id is None:
            return self.trained.adapter()
        plan = self.trained.plan
        layout = plan.trained_layout(self.model.shapes, client_id)
        flat = self.model.start(plan, client_id, self.memory.recall(plan, client_id))
        return layout.factors(flat), layout.whole_tensors(flat)

    def write_adapter(self, folder: Path, factors: Sequence[Factors], head: Sequence[Tensor]) -> None:
        """Write an adapter as PEFT loads it.

        Raises:
            CheckpointError: if the disk refuses.
        """
        settings, tensors = self.model.export(factors, head)
        settings["base_model_name_or_path"] = hub_name(self.config.model.name)
        write_adapter(folder, settings, tensors)

    def write_changed_weights(self, out: Path) -> None:
        """Write the changed base weights into a folder, where there are any.

        Raises:
            CheckpointError: if the disk refuses.
        """
        if changed := self.changed_weights():
            write_base_weights(out / BASE_FOLDER, changed)

    def write_all(self, out: Path) -> None:
        """Write all that a finished run leaves behind.

        Raises:
            CheckpointError: if the disk refuses.
        """
        self.write_changed_weights(out)
        if self.keeps_b:
            for client_id in self.clients:
                folder = out / CLIENT_ADAPTERS_FOLDER / f"client-{client_id:05d}"
                self.write_adapter(folder, *self.adapter(client_id))
        elif self.has_adapter:
            self.write_adapter(out / ADAPTER_FOLDER, *self.adapter())
