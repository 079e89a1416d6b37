"""What clients keep between rounds, for whichever worker trains them next."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mpifedlora.core.plan import RoundPlan
from mpifedlora.io.client_store import ClientStore


class Memory:
    """Clients' states on storage that all processes see; a plan names the version that holds.

    Args:
        store: of the run.
    """

    def __init__(self, store: ClientStore) -> None:
        self.store = store

    def recall(self, plan: RoundPlan, client_id: int) -> Mapping[str, Tensor]:
        """Return what a client has kept; nothing before its first finished round."""
        round_num = plan.state_rounds[client_id] if plan.state_rounds else 0
        return self.store.read(client_id, round_num) if round_num else {}

    def keep(self, plan: RoundPlan, client_id: int, state: Mapping[str, Tensor]) -> None:
        """Write what a client keeps from this round; it holds once the server has finished the round."""
        if state:
            self.store.write(client_id, plan.round_num, state)
