"""Lists within messages."""

from collections.abc import Iterable


def listed(lines: Iterable[str], most: int = 20) -> str:
    """Each on a line of its own, and how many there are beyond `most`."""
    lines = list(lines)
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in [*lines[:most], *more])
