"""One failure is one message, whoever started the ranks; and ranks never outlive their launcher."""

import os
import re
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.ranks import FORKSERVER

HOST = socket.gethostname()


def _in_child(what: str, folder: Path, processes: int, plain: bool, extra: list[str]) -> None:
    from torch.distributed import run as torchrun

    from forgather.cli.terminal import print_error
    from forgather.distributed.launcher import launch
    from forgather.errors import ForgatherError

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    if plain:
        torchrun.main([f"--nproc-per-node={processes}", "-m", "tests.distributed.launched", what, str(folder)])
        return
    tempfile.tempdir = str(folder)
    try:
        code = launch("tests.distributed.launched", [what, str(folder), "--nproc", "--", "-m"], processes, extra)
    except ForgatherError as error:
        print_error(error)
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Launched:
    """A launcher in a process of its own, its output in files."""

    def __init__(self, what: str, folder: Path, *, processes: int = 2, plain: bool = False, extra=()) -> None:
        self.folder = folder
        self.process = FORKSERVER.Process(target=_in_child, args=(what, folder, processes, plain, list(extra)))
        self.process.start()

    def end(self) -> int:
        self.process.join(60)
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def left(self) -> list[Path]:
        return list(self.folder.glob("forgather-*"))

    def rank_pids(self, number: int) -> list[int]:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            texts = [path.read_text() for path in self.folder.glob("rank-*")]
            if len(texts) == number and all(texts):
                return [int(text) for text in texts]
            time.sleep(0.02)
        raise AssertionError(f"the ranks did not start: {self.err}")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until_dead(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)):
        assert time.monotonic() < deadline, "ranks outlive their launcher"
        time.sleep(0.02)


def test_success_is_silent_and_leaves_nothing(tmp_path):
    launched = Launched("succeed", tmp_path)
    assert launched.end() == 0
    assert launched.err == ""
    assert launched.left() == []
    threads = {(tmp_path / f"rank-{rank}").read_text() for rank in range(2)}
    assert threads == {os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))}


@pytest.mark.parametrize("what", ["rank 1 fails", "all fail"])
def test_a_user_error_is_two_lines_and_exit_code_2(what, tmp_path):
    launched = Launched(what, tmp_path)
    assert launched.end() == 2
    rank = "1" if what == "rank 1 fails" else "[01]"
    assert re.fullmatch(
        f"error: rank {rank} of 2 on {re.escape(HOST)}: the corpus is empty\n  fix: give it a file\n", launched.err
    )
    assert launched.left() == []


def test_a_defect_shows_the_first_traceback_last_and_keeps_the_rest(tmp_path):
    launched = Launched("a defect", tmp_path)
    assert launched.end() == 1
    assert launched.err.count("Traceback") == 1
    (folder,) = launched.left()
    assert launched.err.endswith(
        "ValueError: boom\n\n"
        f"error: rank 1 of 2 on {HOST}: ValueError: boom\n"
        f"  fix: the other ranks' errors and torchrun's log are in {folder}\n"
    )
    assert "exitcode" in (folder / "torchrun.log").read_text()


def test_a_killed_rank_is_named_not_the_peer_that_lost_it(tmp_path):
    launched = Launched("killed", tmp_path)
    assert launched.end() == 1
    assert launched.err.startswith(f"error: rank 1 of 2 on {HOST}: killed by SIGKILL\n")


def test_a_rank_that_can_be_resumed_says_so_by_its_exit_code(tmp_path):
    launched = Launched("exit 75", tmp_path)
    assert launched.end() == 75
    assert launched.err == ""


def test_a_reader_that_leaves_is_not_an_error(tmp_path):
    launched = Launched("no reader", tmp_path)
    assert (launched.end(), launched.err, launched.left()) == (141, "", [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_hides_no_error(tmp_path):
    launched = Launched("full disk", tmp_path)
    assert launched.end() == 2
    assert re.fullmatch(
        f"error: rank [01] of 2 on {re.escape(HOST)}: the corpus is empty\n  fix: give it a file\n", launched.err
    )


def test_a_wrong_argument_of_torchrun_is_a_user_error(tmp_path):
    launched = Launched("succeed", tmp_path, extra=["--max-restart-s", "1"])
    assert launched.end() == 2
    assert launched.err.startswith("error: torchrun: unrecognized arguments: --max-restart-s")
    assert launched.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_the_ranks(number, tmp_path):
    launched = Launched("wait", tmp_path)
    pids = launched.rank_pids(2)
    os.kill(launched.process.pid, number)
    assert launched.end() == 128 + number
    _wait_until_dead(pids)
    assert launched.err.startswith(f"\n{signal.Signals(number).name}: ")
    assert launched.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_that_can_save_are_waited_for_and_not_started_again(number, tmp_path):
    launched = Launched("save when told", tmp_path, extra=["--max-restarts", "2"])
    launched.rank_pids(2)
    os.kill(launched.process.pid, number)
    os.kill(launched.process.pid, signal.SIGTERM)  # a job system tells the ranks, too: they get it twice
    assert launched.end() == 75
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert launched.left() == []


def test_the_second_interrupt_ends_the_ranks_at_once(tmp_path):
    launched = Launched("never stop", tmp_path)
    pids = launched.rank_pids(2)
    os.kill(launched.process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert all(map(_alive, pids))
    os.kill(launched.process.pid, signal.SIGINT)
    assert launched.end() == 130
    _wait_until_dead(pids)


def test_a_lost_rank_is_started_again_with_the_others(tmp_path):
    launched = Launched("lost once", tmp_path, extra=["--max-restarts", "2"])
    assert launched.end() == 0
    assert launched.err == f"rank 1 of 2 on {HOST}: killed by SIGKILL; starting again (1 restart left)\n"
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0-attempt-1", "done-1-attempt-1"]


def test_what_the_user_must_mend_is_not_tried_again(tmp_path):
    launched = Launched("rank 1 fails", tmp_path, extra=["--max-restarts", "2"])
    assert launched.end() == 2
    assert launched.err.startswith(f"error: rank 1 of 2 on {HOST}: the corpus is empty\n")


def test_a_peer_that_is_stuck_is_ended_soon_and_not_blamed(tmp_path):
    launched = Launched("one stuck", tmp_path)
    pids = launched.rank_pids(1)
    begun = time.monotonic()
    assert launched.end() == 1
    assert time.monotonic() - begun < 15, "torchrun itself waits 30 s"
    _wait_until_dead(pids)
    assert f"error: rank 1 of 2 on {HOST}: RuntimeError: boom\n" in launched.err


def test_ranks_die_with_a_launcher_that_is_killed(tmp_path):
    launched = Launched("wait", tmp_path)
    pids = launched.rank_pids(2)
    launched.process.kill()
    _wait_until_dead(pids)


def test_under_plain_torchrun_one_rank_speaks(tmp_path):
    launched = Launched("all fail", tmp_path, plain=True)
    assert launched.end() == 1  # torchrun's own exit code
    assert launched.err.count("the corpus is empty") == 1
    assert "DataError" not in launched.err, "a user error has no traceback"
