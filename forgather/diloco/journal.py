"""One line for each version that is published before it is saved: who made it, fsynced before anybody hears of it.

A server that comes back from an older state lets the same contributions close the same rounds, at the same rates.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgather.checkpoint.part import write_all
from forgather.diloco.frame import parse_json
from forgather.diloco.messages import Version
from forgather.durable import sync
from forgather.errors import CheckpointError

_LONG = 1 << 16  # bytes


@dataclass(frozen=True)
class Made:
    """What made a version: contributions, by worker and round, and the rates of the outer optimizer."""

    contributors: Sequence[tuple[str, int]]
    rates: Mapping[str, float]


class Journal:
    """The lines in the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rates: Mapping[str, Any] | None = None  # as they were changed last, once `after` has read it
        self._is_named = True  # on the disk, where it is there

    def add(self, fragment: int, version: Version, made: Made) -> None:
        """Return when it is on the disk. OSError when that cannot be; then there is no such line."""
        self._write([fragment, version.to_json(), [list(each) for each in made.contributors], dict(made.rates)])

    def add_rates(self, state: Mapping[str, Any]) -> None:
        """The same of the state of the rates, when an operator has changed them."""
        self._write({"rates": state})

    def _write(self, content: Any) -> None:
        self._is_named = self._is_named and self.path.exists()
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                write_all(file.fileno(), memoryview(json.dumps(content).encode() + b"\n"))
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        if not self._is_named:
            sync(self.path.parent)
            self._is_named = True

    def size(self) -> int:
        """How long it is, in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def clear(self, size: int) -> None:
        """What it had when it was so long is in a checkpoint; what came since stays.

        Some of what is in the checkpoint may stay too, as it will be passed over: to write the rest anew takes two
        waits for the disk, before the next line. OSError when the disk refuses.
        """
        if self.size() <= size:
            self.path.unlink(missing_ok=True)
            return
        with self.path.open("rb") as file:
            saved, rest = file.read(size), file.read()
        if len(saved) < _LONG and b'{"rates"' not in saved:  # rates are not known to be older
            return
        aside = self.path.with_suffix(".new")
        with aside.open("wb", buffering=0) as new:
            write_all(new.fileno(), memoryview(rest))
            os.fsync(new.fileno())
        self._is_named = False
        aside.rename(self.path)
        sync(self.path.parent)
        self._is_named = True

    def after(self, versions: Sequence[Version]) -> list[list[Made]]:
        """For each fragment what made the versions that come after these, in order.

        Lines that are of other values than these are of no use, and passed over. One that was not finished, by a server
        that was killed, is cut off: another could not be read behind it.
        """
        rounds: list[list[Made]] = [[] for _ in versions]
        if not self.path.exists():
            return rounds
        *lines, torn = self.path.read_bytes().split(b"\n")
        if torn:
            self._cut(len(torn))
        for line in lines:
            content = self._read(line)
            if isinstance(content, dict):
                self.rates = content["rates"]
                continue
            fragment, number, made = content
            place = number - versions[fragment].number - 1
            if 0 <= place <= len(rounds[fragment]) and rounds[fragment][place : place + 1] != [made]:
                # What was made again as it was is nothing new; if others made it, what came after is not to come again.
                rounds[fragment][place:] = [made]
        return rounds

    def _read(self, line: bytes) -> tuple[int, int, Made] | dict[str, Any]:
        try:
            content = parse_json(line)
            if isinstance(content, dict):
                return {"rates": dict(content["rates"])}
            fragment, version, contributors, rates = content
            found = [(str(worker), int(round)) for worker, round in contributors]
            made = Made(found, {str(name): float(rate) for name, rate in rates.items()})
            return int(fragment), Version.from_json(version).number, made
        except Exception as error:
            raise CheckpointError(
                f"{self.path} is damaged: {line[:60]!r}", fix=f"remove it, to go on without: {self.path}"
            ) from error

    def _cut(self, num_bytes: int) -> None:
        with self.path.open("r+b", buffering=0) as file:
            file.truncate(self.path.stat().st_size - num_bytes)
            os.fsync(file.fileno())
