"""Where the order of a run's data asks for rows before the run knows its server: DiLoCo opens it when it has joined."""

from collections.abc import Mapping

from forgather.diloco.client import Client
from forgather.diloco.membership import Membership
from forgather.errors import DistributedError


class LeaseDesk:
    """Asks the server for work units, if `is_open`; `ask` is what a `LeasedOrder` takes. Threads ask one at a time."""

    def __init__(self, is_open: bool = False) -> None:
        self.is_open = is_open
        self._membership: Membership | None = None

    def join(self, membership: Membership) -> None:
        """The worker is known to its server from now on."""
        self._membership = membership

    def ask(self, sequence: int, rows: int, order: str) -> Mapping[str, int]:
        """The `sequence`-th unit that is leased to this worker; see `leased_order.Ask` for what it raises."""
        if self._membership is None:
            raise DistributedError(
                "rows are leased by the server, which this run has not joined", fix="run it without --dry-run"
            )
        client: Client = self._membership.borrow()
        try:
            return client.unit(sequence, rows, order)
        finally:
            self._membership.give_back(client)
