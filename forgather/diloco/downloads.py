"""Answers with values that are under way, so that a slow one comes to its end some day.

A new version takes the place of what an answer is made of, and breaks it off. Where versions come faster than the link
of a worker can take one, it would never have any. So what was broken off is waited for the next time, longer each time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from forgather.diloco.messages import Slice

FIRST_S, LONGEST_S = 30.0, 1800.0  # how long a version waits for an answer that was broken off once, and at most
_MOST_REMEMBERED = 4096


class ChangedError(Exception):
    """The values have changed while they were sent."""


Key = tuple[str, int]  # a worker, and which slices: each of its ranks asks for its own


@dataclass
class Downloads:
    """The answers of one fragment."""

    _under_way: dict[int, Key] = field(default_factory=dict)
    _broken_off: dict[Key, int] = field(default_factory=dict)  # how often, since it was whole the last time
    _number: int = 0

    @contextmanager
    def sending(self, worker: str, slices: Sequence[Slice]) -> Iterator[None]:
        """While an answer is sent. ChangedError that ends it is counted."""
        key = (worker, hash(tuple(slices)))
        self._number += 1
        number = self._number
        self._under_way[number] = key
        try:
            yield
            self._broken_off.pop(key, None)
        except ChangedError:
            self._broken_off[key] = 1 + self._broken_off.pop(key, 0)
            while len(self._broken_off) > _MOST_REMEMBERED:
                del self._broken_off[next(iter(self._broken_off))]
            raise
        finally:
            del self._under_way[number]

    def waited_for(self) -> dict[str, float]:
        """For whom a new version is to wait, and for how many seconds at most."""
        waited: dict[str, float] = {}
        for key in self._under_way.values():
            if times := self._broken_off.get(key, 0):
                seconds = min(LONGEST_S, FIRST_S * 2 ** (times - 1))
                waited[key[0]] = max(seconds, waited.get(key[0], 0.0))
        return waited
