"""Says which rank is missing when a collective has timed out, and where that rank is instead.

A timeout tells that somebody did not come, and not who. So each rank has a thread that looks every `POLL_S` seconds
whether a roll is called, and answers with the place at which its main thread is. The rank whose collective has timed
out calls the roll before it ends. A rank that does not answer is stopped, or its host is gone. Everything goes through
the store by which the ranks met, so it needs no collective.
"""

import linecache
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch.distributed import DistError, Store  # type: ignore[attr-defined]  # not listed in its __all__

POLL_S = 2.0
ANSWER_S = 2 * POLL_S + 1

_OURS = str(Path(__file__).resolve().parents[1]) + os.sep
_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_SIGNS = ("Timed out waiting", "timed out", "Application timeout")

_open: "RollCall | None" = None


class RollCall:
    """Answers for this rank from `start` to `close`; `store` is this rank's own connection."""

    def __init__(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        self.store = store
        self.rank = rank
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self._main = threading.main_thread()
        self._is_closed = threading.Event()
        self._lock = threading.Lock()
        self._has_answered = False

    def start(self) -> None:
        """Answer from now on."""
        global _open
        _open = self
        threading.Thread(target=self._listen, name="forgather-roll-call", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        global _open
        self._is_closed.set()
        if _open is self:
            _open = None

    def missing(self) -> list[str]:
        """Call the roll; a sentence for each rank that waits in no collective. Takes up to `ANSWER_S` seconds."""
        try:
            self._answer("waiting")
            self.store.set("forgather/roll-call", str(self.rank))
            answers = self._collect()
        except DistError:
            return ["the rank that keeps the store of this run does not answer"]
        silent = [rank for rank in range(self.num_ranks) if rank not in answers]
        said = [f"rank {rank} is at {text}" for rank, text in sorted(answers.items()) if text != "waiting"]
        if silent:
            ranks = f"rank {silent[0]} does" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))} do"
            said.append(f"{ranks} not answer: stopped, or the host is gone")
        return said

    def _collect(self) -> dict[int, str]:
        answers: dict[int, str] = {}
        end = time.monotonic() + ANSWER_S
        while len(answers) < self.num_ranks and time.monotonic() < end:
            for rank in range(self.num_ranks):
                if rank not in answers and self.store.check([_key(rank)]):
                    answers[rank] = self.store.get(_key(rank)).decode()
            time.sleep(0.05)
        return answers

    def _listen(self) -> None:
        while not self._is_closed.wait(POLL_S):
            try:
                if self.store.check(["forgather/roll-call"]):
                    self._answer(self._whereabouts())
                    return
            except DistError:  # whoever keeps the store has gone, and the run with it
                return

    def _answer(self, text: str) -> None:
        with self._lock:
            if not self._has_answered:
                self._has_answered = True
                self.store.set(_key(self.rank), text)

    def _whereabouts(self) -> str:
        frame = sys._current_frames().get(self._main.ident or 0)
        frames = [] if frame is None else [(each, line) for each, line in traceback.walk_stack(frame)]
        places = [_Place.of(each, line) for each, line in frames]  # innermost first
        if any(place.is_waiting for place in places[:20]):
            return "waiting"
        own = next((place for place in places if place.is_own), places[0] if places else None)
        return "an unknown place" if own is None else str(own)


@dataclass(frozen=True)
class _Place:
    file: str
    line: int
    function: str

    @classmethod
    def of(cls, frame: FrameType, line: int) -> "_Place":
        return cls(frame.f_code.co_filename, line, frame.f_code.co_name)

    @property
    def is_own(self) -> bool:
        """Whether it is ours or the user's, and no library's."""
        return self.file.startswith(_OURS) or not self.file.startswith(_LIBRARIES)

    @property
    def is_waiting(self) -> bool:
        return _COLLECTIVES in self.file or (self.file.startswith(_OURS) and ".wait()" in self.text)

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        shown = f"forgather/{self.file.removeprefix(_OURS)}" if self.file.startswith(_OURS) else self.file
        return f"{shown}:{self.line}, {self.function}: {self.text}"


def explain(error: BaseException) -> str | None:
    """What to say of a collective of this rank that has timed out with `error`; None for any other error."""
    if not isinstance(error, RuntimeError) or not any(sign in str(error) for sign in _SIGNS):
        return None
    places = [_Place(each.filename, each.lineno or 0, each.name) for each in traceback.extract_tb(error.__traceback__)]
    name = _name_of_collective(places)
    if name is None:
        return None
    waited = "" if _open is None else f" after {_open.timeout_s:g} s"
    own = next((place for place in reversed(places) if place.is_own), None)
    missing = [] if _open is None else _open.missing()
    return "; ".join([f"{name} timed out{waited}, called at {own}", *missing])


def _name_of_collective(places: Sequence[_Place]) -> str | None:
    """The operation's name in torch.distributed, or of FSDP's function that calls it."""
    within = [place for place in places if _COLLECTIVES in place.file and not place.file.endswith("c10d_logger.py")]
    plain = next((place.function for place in within if place.file.endswith("distributed_c10d.py")), None)
    if plain is not None:
        return plain
    if within:
        return within[-1].function
    return places[-1].function if places and places[-1].is_waiting else None


def _key(rank: int) -> str:
    return f"forgather/here/{rank}"
