"""What the ranks of test_launcher do. As cheap as a rank can be: nothing here imports torch."""

import os
import signal
import sys
import time
from pathlib import Path

from forgather.cli.terminal import print_error
from forgather.distributed.failure import OneMessage, die_with_parent
from forgather.errors import DataError


def main(what: str, folder: str, *rest: str) -> None:
    rank = int(os.environ["RANK"])
    assert rest in ((), ("--nproc", "--", "-m")), "words reach the ranks as they were typed"
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with OneMessage(print_error):
        _body(what, rank, Path(folder))


def _body(what: str, rank: int, folder: Path) -> None:
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


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


if __name__ == "__main__":
    main(*sys.argv[1:])
