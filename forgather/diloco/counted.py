"""Which contributions of each worker were counted, kept for ever, as somebody could ask, and in hardly any space.

A worker that takes part in every round is one pair of numbers, however long the run.

One that was late is counted in a later round than the one that it was first sent for. Should the worker be killed
before its next checkpoint, it sends the same progress again, for the first of the two. So it is also kept which version
the last counted contribution began with: the next one of that worker begins with a later version, which has this one.
"""

from collections.abc import Mapping
from typing import Any

from forgather.diloco.spans import Spans


class Counted:
    """The contributions to one fragment by worker."""

    def __init__(self) -> None:
        self._rounds: dict[str, Spans] = {}
        self._bases: dict[str, int] = {}  # the number of the version that the last one began with

    def add(self, worker: str, round: int, base: int, before: int) -> None:
        """A contribution for `round`, which began with version `base`, has made a version of version `before`.

        One that began with a later version than that is from before the server came back from an older state: what the
        worker makes next begins with the version that was just made, or a later one.
        """
        self._rounds.setdefault(worker, Spans()).add(round, round + 1)
        self._bases[worker] = min(base, before)

    def has(self, worker: str, round: int) -> bool:
        return worker in self._rounds and self._rounds[worker].count(round, round + 1) > 0

    def has_begun_with(self, worker: str, base: int) -> bool:
        """Whether what this worker made of version `base` was counted already, for whichever round."""
        return base <= self._bases.get(worker, -1)

    def know_as(self, worker: str, round: int) -> None:
        """A contribution that was counted is also known by this round."""
        self._rounds[worker].add(round, round + 1)

    def forget(self, worker: str) -> None:
        """Another worker has the name now."""
        self._rounds.pop(worker, None)
        self._bases.pop(worker, None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rounds": {worker: rounds.to_json() for worker, rounds in self._rounds.items()},
            "bases": dict(self._bases),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rounds = {worker: Spans.from_json(rounds) for worker, rounds in state["rounds"].items()}
        self._bases = {worker: int(base) for worker, base in state["bases"].items()}
