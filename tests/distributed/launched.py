"""What the ranks of test_launcher do. As cheap as a rank can be: nothing here imports torch."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from forgather.cli.terminal import print_error
from forgather.distributed.failure import OneMessage, die_with_parent, exit_code_for_agent
from forgather.errors import DataError


def main(what: str, folder: str, *rest: str) -> None:
    rank = int(os.environ["RANK"])
    assert rest in ((), ("--nproc", "--", "-m")), "words reach the ranks as they were typed"
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with OneMessage(print_error):
        sys.exit(exit_code_for_agent(_body(what, rank, Path(folder)) or 0))


def _body(what: str, rank: int, folder: Path) -> int | None:
    print(f"rank {rank} begins", flush=True)
    if what == "succeed":
        (folder / f"rank-{rank}").write_text(os.environ["OMP_NUM_THREADS"])
    elif what == "all fail":
        raise DataError("the corpus is empty", fix="give it a file")
    elif what == "rank 1 fails":
        if rank == 1:
            raise DataError("the corpus is empty", fix="give it a file")
        time.sleep(60)
    elif what == "a defect":
        if rank == 1:
            (folder / "failing").touch()
            raise ValueError("boom")
        _wait_for(folder / "failing")
        time.sleep(0.2)
        raise RuntimeError("Connection closed by peer")
    elif what == "killed":
        if rank == 1:
            (folder / "failing").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        _wait_for(folder / "failing")
        time.sleep(0.02)
        raise RuntimeError("Connection closed by peer")
    elif what == "no reader":
        if rank == 0:
            raise BrokenPipeError
        time.sleep(60)
    elif what == "full disk":
        sys.stdout = Path("/dev/full").open("w")  # noqa: SIM115  buffered, unlike what torchrun gives its ranks
        print("what cannot be written")
        raise DataError("the corpus is empty", fix="give it a file")
    elif what == "exit 75":
        sys.exit(75)
    elif what == "wait":
        (folder / f"rank-{rank}").write_text(str(os.getpid()))
        time.sleep(60)
    elif what == "save when told":
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        (folder / f"rank-{rank}").write_text(str(os.getpid()))
        _wait_until(lambda: told)
        time.sleep(0.5)
        (folder / f"saved-{rank}").touch()
        return 75
    elif what == "never stop":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / f"rank-{rank}").write_text(str(os.getpid()))
        time.sleep(60)
    elif what == "lost once":
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if attempt == 0 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt == 0:
            raise RuntimeError("Connection closed by peer")
        (folder / f"done-{rank}-attempt-{attempt}").touch()
    elif what == "one stuck":
        if rank == 1:
            _wait_until((folder / "rank-0").exists)
            raise RuntimeError("boom")
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
        (folder / f"rank-{rank}").write_text(str(os.getpid()))
        time.sleep(60)
    return None


def _wait_for(path: Path) -> None:
    _wait_until(path.exists)


def _wait_until(is_true: Callable[[], object]) -> None:
    while not is_true():
        time.sleep(0.005)


if __name__ == "__main__":
    main(*sys.argv[1:])
