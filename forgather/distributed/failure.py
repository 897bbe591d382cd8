"""How the failure of one rank becomes the one message of a run.

A rank that fails leaves a record in the folder that the launcher named; the launcher prints the record of the rank
that failed first, and nothing else. Without our launcher (plain torchrun) the ranks settle among themselves which of
them failed first, and that one prints. Nothing here imports torch before something has failed.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from forgather.distributed import rank_log
from forgather.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_RESUMABLE,
    EXIT_USER,
    DistributedError,
    ForgatherError,
)

FOLDER_VARIABLE = "FORGATHER_FAILURES"  # set by the launcher for its ranks

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SLOW = "see that rank's log; if it was only slow, raise collective_timeout_s"

# Says of an error of which kind it is, if it can: distributed.roll_call, which imports torch, puts itself here.
_explanations: list[Callable[[BaseException], str | None]] = []


@dataclass(frozen=True)
class Failure:
    """What one rank says about its end. `traceback` is None for errors that the user can mend."""

    rank: int
    world_size: int
    host: str
    time: float  # seconds since the epoch
    message: str
    fix: str | None
    traceback: str | None
    exit_code: int
    log: str | None = None  # the file that holds what this rank has printed

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """The failure of this rank by `error`."""
        user = error if isinstance(error, ForgatherError) else None
        if isinstance(error, BrokenPipeError):  # nobody's mistake, and there is nobody to tell
            user = ForgatherError("whoever read the output has gone")
            user.exit_code = EXIT_BROKEN_PIPE
        said = None if user else next((text for explain in _explanations if (text := explain(error))), None)
        if said is not None:  # nobody's defect, and nothing that another start would not mend
            user = ForgatherError(said, fix=_SLOW)
            user.exit_code = EXIT_INTERNAL
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            host=socket.gethostname(),
            time=time.time(),
            message=user.message if user else _shown(error),
            fix=user.fix if user else None,
            traceback=None if user else "".join(traceback.format_exception(error)),
            exit_code=user.exit_code if user else EXIT_INTERNAL,
            log=str(log) if (log := rank_log.log_path()) else None,
        )

    @property
    def can_be_mended(self) -> bool:
        """Whether it says what the user can do, so that the same start again would fail again."""
        return self.traceback is None and self.fix is not None and self.exit_code == EXIT_USER

    def write(self, folder: Path) -> None:
        """Leave the record where the launcher looks; whole or not at all."""
        # Ranks may be restarted by the agent: the records of an earlier attempt stay apart.
        name = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-rank-{self.rank}.json"
        partial = folder / f".{name}.partial"
        partial.write_text(json.dumps(asdict(self)))
        partial.rename(folder / name)

    def error(self) -> ForgatherError:
        """The failure as the error that the whole run ends with."""
        error = ForgatherError(f"rank {self.rank} of {self.world_size} on {self.host}: {self.message}", fix=self.fix)
        error.exit_code = self.exit_code
        return error


def read_failures(folder: Path) -> list[Failure]:
    """The records of the last attempt, first failure first."""
    attempts: dict[int, list[Failure]] = {}
    for path in folder.glob("attempt-*-rank-*.json"):
        attempt = int(path.name.split("-")[1])
        attempts.setdefault(attempt, []).append(Failure(**json.loads(path.read_text())))
    return sorted(attempts[max(attempts)], key=lambda failure: failure.time) if attempts else []


def check_rank_variables() -> None:
    """Raise a DistributedError unless the variables by which a launcher numbers its ranks hold numbers."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "0")
        if not text.isdecimal():
            fix = f"torchrun sets it; outside of torchrun, `unset {name}`"
            raise DistributedError(f"the environment variable {name} is {text!r}, and no number of a rank", fix=fix)


class OneMessage:
    """Around the body of a rank: a failure is recorded, or printed once for all ranks, and ends the process."""

    def __init__(self, print_error: Callable[[ForgatherError], None]) -> None:
        self.print_error = print_error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not isinstance(error, Exception):  # no failure, or one that is meant: SystemExit, KeyboardInterrupt
            return
        failure = Failure.of(error)
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder is not None:
            failure.write(Path(folder))
        elif failure.exit_code != EXIT_BROKEN_PIPE and _is_first():
            with rank_log.on_terminal():
                if failure.traceback is not None:
                    print(failure.traceback, file=sys.stderr)
                self.print_error(failure.error())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # that it cannot be written may be the failure
                stream.flush()
        # At once: the peers wait in collectives until torchrun sees this process end, and taking down a process group
        # whose peers are lost can hang or shout.
        os._exit(failure.exit_code)


def _is_first() -> bool:
    """Whether this rank is the first that asks; ranks of all hosts ask the store of torchrun's agent."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # nobody to ask: better twice than never
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # not listed in its __all__

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=10)
        )
        return store.add(f"forgather/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except DistError:  # the agent has gone
        return True


def explain_with(explain: Callable[[BaseException], str | None]) -> None:
    """Let `explain` say of an internal error what it means; None where it does not know."""
    if explain not in _explanations:
        _explanations.append(explain)


def _shown(error: BaseException) -> str:
    """An internal error in its own words, but for Gloo's of a peer that has gone."""
    text = "".join(traceback.format_exception_only(error)).strip()
    lost = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", text) if "gloo" in text and "by peer" in text else None
    return text if lost is None else f"the connection to a rank on {lost[1]} was lost: its process or host is gone"


def clear_failures(folder: Path) -> None:
    """Forget what the ranks of an earlier start have left."""
    for pattern in ("attempt-*", "left-*"):
        for path in folder.glob(pattern):
            path.unlink()


def exit_code_for_agent(code: int) -> int:
    """What a rank ends with that leaves with `code`, so that what started it does not start it again.

    To torchrun any code but 0 is a failure. A rank that was told to stop has not failed: it leaves its code with our
    launcher, which ends with it. Under plain torchrun it ends with 0 where a failure would be started again.
    """
    if code not in (EXIT_RESUMABLE, EXIT_INTERRUPTED):
        return code
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is not None:
        (Path(folder) / f"left-{code}").touch()
        return 0
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else code


def code_left(folder: Path) -> int | None:
    """The code that ranks have left with our launcher; None when they left none."""
    return next((code for code in (EXIT_INTERRUPTED, EXIT_RESUMABLE) if (folder / f"left-{code}").exists()), None)


def die_with_parent() -> None:
    """End this process when its parent dies, however the parent dies. Linux only; elsewhere nothing happens.

    torchrun's workers live in sessions of their own, so a killed agent would leave them training, and writing
    checkpoints beside those of the run's next start.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
