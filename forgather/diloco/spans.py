"""Sets of row numbers as ascending, disjoint, merged ranges: small however many rows they hold."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, Self

from forgather.errors import DataError


class Spans:
    """A set of row numbers; rows that follow one another are one range, so a set without gaps is one pair."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> int:
        """Put rows start .. stop - 1 in; returns how many of them were there before."""
        if start >= stop:
            return 0
        before = self.count(start, stop)
        first = bisect_left(self._stops, start)  # the first range that reaches to start or beyond
        last = bisect_right(self._starts, stop)  # one after the last range that begins at stop or before
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        return before

    def remove(self, start: int, stop: int) -> int:
        """Take rows start .. stop - 1 out; returns how many of them were there."""
        overlaps = list(self.within(start, stop))
        if not overlaps:
            return 0
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        kept = [(self._starts[first], start), (stop, self._stops[last - 1])]
        kept = [(left, right) for left, right in kept if left < right]
        self._starts[first:last] = [left for left, _ in kept]
        self._stops[first:last] = [right for _, right in kept]
        return sum(right - left for left, right in overlaps)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of the set in start .. stop - 1."""
        for index in range(bisect_right(self._stops, start), bisect_left(self._starts, stop)):
            left, right = max(start, self._starts[index]), min(stop, self._stops[index])
            if left < right:
                yield left, right

    def count(self, start: int, stop: int) -> int:
        """How many of rows start .. stop - 1 are in the set."""
        return sum(right - left for left, right in self.within(start, stop))

    def first_outside(self, start: int, stop: int) -> tuple[int, int] | None:
        """The first range of start .. stop - 1 that has no row of the set; None where all are in it."""
        for left, right in self.within(start, stop):
            if start < left:
                return start, left
            start = right
        return (start, stop) if start < stop else None

    @property
    def stop(self) -> int:
        """One after the last row; 0 where there is none."""
        return self._stops[-1] if self._stops else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def __len__(self) -> int:
        """The number of rows."""
        return sum(self._stops) - sum(self._starts)

    def to_json(self) -> list[list[int]]:
        return [list(each) for each in self]

    @classmethod
    def from_json(cls, value: Any) -> Self:
        try:
            return cls((int(start), int(stop)) for start, stop in value)
        except (TypeError, ValueError):
            raise DataError(f"{value!r} is no set of rows: [[start, stop], ...]") from None
