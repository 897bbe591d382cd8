"""Starts the ranks of a run on this host with torchrun, and ends with one message when they fail.

torchrun's agent runs in this process, so a signal to the launcher is a signal to the agent, which ends the ranks. Its
own report goes to a log: what a person needs is the error of the rank that failed first (`distributed.failure`).
"""

import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from forgather.distributed.devices import count_cores
from forgather.distributed.failure import FOLDER_VARIABLE, Failure, first_failure, read_failures
from forgather.errors import EXIT_BROKEN_PIPE, EXIT_INTERNAL, EXIT_OK, EXIT_RESUMABLE, DistributedError, ForgatherError

# With any of these the ranks meet as the user says, not on a free port of this host.
_RENDEZVOUS = ("--nnodes", "--rdzv", "--master", "--node-rank", "--node_rank", "--standalone")


def launch(module: str, arguments: Sequence[str], processes: int, extra: Sequence[str] = ()) -> int:
    """Run `python -m module arguments` on `processes` ranks of this host; return the exit code of the run.

    `extra` are further arguments of torchrun. Raises the error of the first rank that failed.
    """
    settings = _parse(_command(module, processes, extra))
    # Not parsed with the rest: argparse looks for torchrun's flags among the program's own, `--nproc` for one.
    settings.training_script_args = list(arguments)
    folder = Path(tempfile.mkdtemp(prefix="forgather-"))
    os.environ[FOLDER_VARIABLE] = str(folder)
    # Otherwise a restart may meet the dead ranks' addresses in the agent's store, and hang (pytorch#135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # torchrun would say 1 whatever the machine; this shares it out.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // processes)))
    _log_to(folder / "torchrun.log")
    try:
        torchrun.run(settings)  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        (folder / "report.txt").write_text(str(failed))
        return _end(folder, failed, processes)
    except SignalException as stopped:
        shutil.rmtree(folder)
        return 128 + stopped.sigval
    shutil.rmtree(folder)
    return EXIT_OK


def _command(module: str, processes: int, extra: Sequence[str]) -> list[str]:
    meeting = [] if any(word.startswith(_RENDEZVOUS) for word in extra) else ["--standalone"]
    return [*meeting, f"--nproc-per-node={processes}", *extra, "-m", module]


def _parse(command: list[str]) -> Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return torchrun.get_args_parser().parse_args(command)
    except SystemExit as stopped:
        if stopped.code == EXIT_OK:  # `-- --help`
            raise
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise DistributedError(f"torchrun: {reason}", fix="see `torchrun --help` for what may follow `--`") from None


def _log_to(path: Path) -> None:
    """Send what torchrun's agent says to a file instead of the terminal, which belongs to the ranks."""
    top = logging.getLogger("torch")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    top.handlers = [logging.FileHandler(path)]
    top.propagate = False


def _end(folder: Path, failed: ChildFailedError, world_size: int) -> int:
    """Raise the first failure, or return the exit code of a rank that left without an error."""
    first_rank, first = failed.get_first_failure()
    # What the agent itself killed, because it did not stop in time, comes much later than the first failure.
    early = {rank: end for rank, end in failed.failures.items() if end.timestamp <= first.timestamp + 1}
    killed = {
        rank: -end.exitcode for rank, end in early.items() if end.exitcode < 0 and end.exitcode != -signal.SIGTERM
    }
    records = read_failures(folder)
    failure = first_failure(records, killed, world_size)
    if failure is None:
        shutil.rmtree(folder)
        if first.exitcode == EXIT_RESUMABLE:
            return EXIT_RESUMABLE
        raise _left(first_rank, first.exitcode)
    if failure.exit_code == EXIT_INTERNAL:
        raise _internal(failure, folder)
    shutil.rmtree(folder)
    if failure.exit_code == EXIT_BROKEN_PIPE:
        return EXIT_BROKEN_PIPE
    raise failure.error()


def _left(rank: int, exit_code: int) -> ForgatherError:
    how = f"left with exit code {exit_code}" if exit_code > 0 else f"was ended by {signal.Signals(-exit_code).name}"
    error = ForgatherError(f"rank {rank} {how} and said nothing")
    error.exit_code = exit_code if exit_code > 0 else 128 - exit_code
    return error


def _internal(failure: Failure, folder: Path) -> ForgatherError:
    if failure.traceback is not None:
        print(failure.traceback, file=sys.stderr)
    error = failure.error()
    where = f"the other ranks' errors and torchrun's log are in {folder}"
    error.fix = f"{error.fix}; {where}" if error.fix else where
    return error
