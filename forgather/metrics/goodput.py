"""Where the wall time of a run went, over all the processes it took: a ledger that adds up.

    useful       steps that the run's weights rest on
    start_up     from the birth of a process to its first step, and what its first two took longer than its third
    data_wait    the loop waited for the loader (on the slowest rank)
    exchange     the loop waited for other machines' part in the training (DiLoCo)
    checkpoint   the loop stood still for a save; what is written behind its back costs nothing here
    evaluation, sampling, inspection
    redo         steps that a fault took back: made after the checkpoint from which the run went on
    down         nobody ran: from the last sign of life before a fault to the next process

Their sum is the wall time from the first process on, without the time after an orderly end: a run that was stopped on
Friday and continued on Monday has not lost a weekend. Goodput is `useful` over that sum.

The ledger is a small JSON file in the run folder, which rank 0 writes at most every second and at the end. A checkpoint
holds how much was useful when it was made, so a resume knows how much of the rest was lost.
"""

import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from forgather.distributed import collectives
from forgather.errors import TrainingError
from forgather.metrics.clock import ActivityClock

ENTRIES = (
    "useful", "start_up", "data_wait", "exchange", "checkpoint", "evaluation", "sampling", "inspection", "redo", "down",
)  # fmt: skip
_WRITE_EVERY_S = 1.0


class Ledger:
    """The account of one run in the file `path`; every rank may call it, and rank 0 keeps it.

    With `path` None it is the account of this process alone.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._clock: ActivityClock | None = None
        self._before: dict[str, float] = dict.fromkeys(ENTRIES, 0.0)  # of earlier processes
        self._moved: dict[str, float] = dict.fromkeys(ENTRIES, 0.0)  # between entries, or of this process's youth
        self._began = 0.0  # of the first process, since the epoch
        self._processes = 1
        self._useful_at_checkpoint = 0.0
        self._written_at = -_WRITE_EVERY_S
        self._first_steps_s: list[float] = []
        self._trained_s = 0.0
        self._counts_from_birth = False

    def count_from_birth(self) -> None:
        """Let the start-up begin with the process and not with the clock: a process that lives for this run alone."""
        self._counts_from_birth = True

    def open(self, clock: ActivityClock) -> None:
        """Begin the account of this process, at its first step: `clock` has gone since its start-up."""
        self._clock = clock
        ticked_s = sum(clock.seconds().values())
        age_s = max(ticked_s, _process_age_s()) if self._counts_from_birth else ticked_s
        self._moved["start_up"] += age_s - ticked_s
        born = time.time() - age_s
        self._began = born
        if self._path is None or collectives.rank() != 0:
            return
        earlier = _read(self._path)
        if earlier is not None:
            self._take_over(earlier, born)
        self.write()

    def step_made(self) -> None:
        """Note that a step has ended; at most once a second the file is written."""
        assert self._clock is not None, "the meter is started before the first step"
        if len(self._first_steps_s) < 3:
            self._compare_first_steps(self._clock)
        if time.perf_counter() - self._written_at >= _WRITE_EVERY_S:
            self.write()

    def waited_longer(self, seconds: float) -> None:
        """Let `seconds` of useful time be data wait: another rank's loader was slower by that."""
        self._move("useful", "data_wait", seconds)

    def seconds(self) -> dict[str, float]:
        """What each entry has taken until now, in all processes."""
        assert self._clock is not None, "the meter is started before the first step"
        spent = {("useful" if name == "training" else name): s for name, s in self._clock.seconds().items()}
        return {name: self._before[name] + self._moved[name] + spent.get(name, 0.0) for name in ENTRIES}

    @property
    def goodput(self) -> float:
        """The share of the wall time that was useful."""
        seconds = self.seconds()
        return seconds["useful"] / sum(seconds.values())

    def summary(self) -> dict[str, float]:
        """The ledger as metrics: `goodput`, `wall_s`, how many processes it took, and an `<entry>_s` for each entry."""
        seconds = self.seconds()
        wall_s = sum(seconds.values())
        head = {"goodput": seconds["useful"] / wall_s, "wall_s": wall_s, "processes": float(self._processes)}
        return head | {f"{name}_s": value for name, value in seconds.items()}

    def describe(self) -> str:
        """One line: the goodput, and what the rest of the time went into."""
        seconds = self.seconds()
        wall_s = sum(seconds.values())
        losses = sorted((s, name) for name, s in seconds.items() if name != "useful" and s >= 0.0005 * wall_s)
        lost = ", ".join(f"{name.replace('_', ' ')} {s / wall_s:.1%}" for s, name in reversed(losses))
        return f"goodput {seconds['useful'] / wall_s:.1%} of {_spell(wall_s)}: {lost or 'no loss'}"

    def write(self, *, is_orderly_end: bool = False) -> None:
        """Put the account into the file, whole. `is_orderly_end`: what comes until the next process is no loss."""
        self._written_at = time.perf_counter()
        if self._path is None or collectives.rank() != 0:
            return
        account = {
            "began": self._began,
            "until": time.time(),
            "is_orderly_end": is_orderly_end,
            "processes": self._processes,
            "seconds": {name: round(value, 4) for name, value in self.seconds().items()},
        }
        partial = self._path.with_suffix(".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(account, indent=1) + "\n")
            partial.replace(self._path)
        except OSError as error:
            raise TrainingError(
                f"cannot write the account of the run's time to {self._path}: {error.strerror}",
                fix="free space there or make it writable, then start the same command again: it resumes",
            ) from error

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint remembers: how much of the time it rests on."""
        return {"useful_s": self.seconds()["useful"] if self._clock is not None else 0.0}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._useful_at_checkpoint = float(state["useful_s"])

    def _take_over(self, earlier: Mapping[str, Any], born: float) -> None:
        self._before |= earlier["seconds"]
        self._began = earlier["began"]
        self._processes = earlier["processes"] + 1
        # torchrun ends all ranks in good order when one has failed, and starts them again: that is a fault too.
        is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if is_restart or not earlier["is_orderly_end"]:
            self._before["down"] += max(0.0, born - earlier["until"])
        lost = max(0.0, self._before["useful"] - self._useful_at_checkpoint)
        self._before["useful"] -= lost
        self._before["redo"] += lost

    def _compare_first_steps(self, clock: ActivityClock) -> None:
        """Book what the first two steps took longer than the third as start-up: they warm up, and both may compile."""
        trained_s = clock.seconds()["training"]
        self._first_steps_s.append(trained_s - self._trained_s)
        self._trained_s = trained_s
        if len(self._first_steps_s) == 3:
            *warming_up, usual = self._first_steps_s
            self._move("useful", "start_up", sum(max(0.0, step_s - usual) for step_s in warming_up))

    def _move(self, source: str, target: str, seconds: float) -> None:
        self._moved[source] -= seconds
        self._moved[target] += seconds


def _spell(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        account: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"cannot read the account of the run's time in {path}: {error}",
            fix=f"remove {path}: the run then counts anew",
        ) from error
    return account


def _process_age_s() -> float:
    """How long this process has lived, by the kernel's books; 0 where there are none to be read."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return max(0.0, uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
