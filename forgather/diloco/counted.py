"""Which rounds each worker was counted in, kept for ever: as long as somebody could ask, and in hardly any space.

A worker that takes part in every round is one pair of numbers, however long the run.
"""

from collections.abc import Mapping
from typing import Any

from forgather.diloco.spans import Spans


class Counted:
    """The rounds of one fragment by worker."""

    def __init__(self) -> None:
        self._rounds: dict[str, Spans] = {}

    def add(self, worker: str, round: int) -> None:
        self._rounds.setdefault(worker, Spans()).add(round, round + 1)

    def has(self, worker: str, round: int) -> bool:
        return worker in self._rounds and self._rounds[worker].count(round, round + 1) > 0

    def forget(self, worker: str) -> None:
        """Another worker has the name now."""
        self._rounds.pop(worker, None)

    def state_dict(self) -> dict[str, Any]:
        return {worker: rounds.to_json() for worker, rounds in self._rounds.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rounds = {worker: Spans.from_json(rounds) for worker, rounds in state.items()}
