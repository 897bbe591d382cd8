"""The table in which a benchmark ends: what was measured, what was asked, and whether it is so."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """One figure and its limit; `sign` says on which side of `limit` it has to be."""

    name: str
    measured: float
    sign: str
    limit: float

    @property
    def is_reached(self) -> bool:
        return self.measured >= self.limit if self.sign == ">=" else self.measured <= self.limit


def print_verdict(bars: Sequence[Bar]) -> int:
    """Print the table; the exit code, 1 if a bar is missed."""
    width = max(len(bar.name) for bar in bars) + 2
    print(f"\n{'':<{width}}{'measured':>10}{'bar':>12}")
    for bar in bars:
        limit, verdict = f"{bar.sign} {bar.limit:g}", "reached" if bar.is_reached else "MISSED"
        print(f"{bar.name:<{width}}{bar.measured:>10.3g}{limit:>12}  {verdict}")
    return 0 if all(bar.is_reached for bar in bars) else 1
