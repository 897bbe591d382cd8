"""Where metrics are kept: a JSON-lines record, which is the truth about a run, and TensorBoard, fed with the same.

Both have `start(step)`, `write(step, metrics, kind)` and `close()`; every rank may call them and rank 0 writes. A row
is on its way to the disk when `write` returns, so a killed run loses none.

A run that was killed after step 150 and goes on from its checkpoint of step 100 makes the steps 101 to 150 again.
`start(100)` therefore takes their first rows out, and the record stays single-valued: one row for each kind and step.
What was taken out is not lost: it is appended to `NAME.superseded.jsonl` beside the record.
"""

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from forgather.distributed import collectives
from forgather.errors import TrainingError
from forgather.metrics.units import UNITS

# Text is a metric too: a sample that the model wrote at a step.
Metrics = Mapping[str, float | str]


class JsonLines:
    """One JSON object a line: first the units of all names, then `kind`, `step`, `time` and the metrics of each row.

    JSON has no word for a number that is none, so NaN and the infinities are the strings "NaN", "Infinity" and
    "-Infinity", which `float()` reads.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: FileIO | None = None

    def start(self, step: int) -> None:
        """Open the record for a run that has made `step` steps: 0 for a new one, a checkpoint's when it goes on."""
        if collectives.rank() != 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                self._set_aside_rows_beyond(step)
            # Unbuffered: a row is handed over whole, and one that was refused is not tried again by close().
            self._file = self.path.open("ab", buffering=0)
            if self._file.tell() == 0:
                self._append({"kind": "header", "units": UNITS})
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, step: int, metrics: Metrics, kind: str = "train") -> None:
        """Append one row."""
        if collectives.rank() != 0:
            return
        values = {name: _spell(value) for name, value in metrics.items()}
        try:
            self._append({"kind": kind, "step": step, "time": round(time.time(), 3), **values})
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None, "start() opens the record"
        line = (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n").encode()
        if self._file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _set_aside_rows_beyond(self, step: int) -> None:
        kept: list[str] = []
        superseded: list[str] = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            (kept if _is_kept(line, step) else superseded).append(line)
        if not superseded:
            return
        with self.path.with_suffix(".superseded.jsonl").open("a", encoding="utf-8") as aside:
            aside.writelines(line if line.endswith("\n") else line + "\n" for line in superseded)
        # Written whole before it takes the record's place: a kill in between leaves the old record.
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.path)

    def _unwritable(self, error: OSError) -> TrainingError:
        self.close()
        return TrainingError(
            f"cannot write the metrics to {self.path}: {error.strerror}",
            fix="free space there or make it writable, then start the same command again: it resumes",
        )


class TensorBoard:
    """Event files for TensorBoard, one scalar `kind/name` for each metric, and text for text."""

    def __init__(self, dir: str | os.PathLike[str]) -> None:
        self.dir = Path(dir)
        self._writer: SummaryWriter | None = None

    def start(self, step: int) -> None:
        """Open the folder for a run that has made `step` steps; TensorBoard then hides what it has beyond them."""
        if collectives.rank() == 0:
            try:
                self._writer = SummaryWriter(str(self.dir), purge_step=step + 1 if step > 0 else 0)
            except OSError as error:
                raise TrainingError(
                    f"cannot write TensorBoard's events to {self.dir}: {error.strerror}",
                    fix="free space there or make it writable",
                ) from error

    def write(self, step: int, metrics: Metrics, kind: str = "train") -> None:
        """Add one point to the curve of each metric."""
        if collectives.rank() != 0:
            return
        assert self._writer is not None, "start() opens the folder"
        for name, value in metrics.items():
            add = self._writer.add_text if isinstance(value, str) else self._writer.add_scalar
            add(f"{kind}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_rows(path: str | os.PathLike[str], kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a record, of one `kind` or all but the header; a last row that a kill cut short is left out."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [row for row in map(_parse, lines) if row is not None and row["kind"] != "header"]
    return [row for row in rows if kind is None or row["kind"] == kind]


def _is_kept(line: str, step: int) -> bool:
    row = _parse(line) if line.endswith("\n") else None
    if row is None:
        return False
    # A run that starts from nothing makes all its rows, also that of an evaluation before the first step.
    return row["kind"] == "header" or bool(0 < step >= row["step"])


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None  # cut short by a kill
    is_row = isinstance(row, dict) and (row.get("kind") == "header" or isinstance(row.get("step"), int))
    return row if is_row else None


def _spell(value: float | str) -> float | str:
    if isinstance(value, str) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
