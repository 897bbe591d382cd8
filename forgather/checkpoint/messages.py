"""What a rank and the process that writes its checkpoints say to each other.

In a module of its own: a process that is started by a module's name has that module's classes twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from forgather.checkpoint.commit import Commit
from forgather.checkpoint.part import Item
from forgather.errors import ForgatherError


@dataclass(frozen=True)
class Layout:
    """What stands where in the memory; sent when it changes, not with every save."""

    items: Sequence[Item]
    num_bytes: int


@dataclass(frozen=True)
class WritePart:
    """Write what is in the memory into the draft of `final`; with `commit`, make the checkpoint whole afterwards.

    Answers carry its `number`, by which those to an earlier one are known.
    """

    number: int
    final: Path
    rank: int
    document: Mapping[str, Any]
    copies: Mapping[str, str]
    commit: Commit | None


@dataclass(frozen=True)
class Abandon:
    """Wait no longer for the parts of other ranks: one of them will not come."""


@dataclass(frozen=True)
class Written:
    """This rank's part is on the disk, and its memory may be overwritten."""

    number: int


@dataclass(frozen=True)
class Committed:
    """The checkpoint is whole; `warnings` are to be shown."""

    number: int
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Failed:
    """It was not written, and why."""

    number: int
    error: ForgatherError


Answer: TypeAlias = Written | Committed | Failed
