"""Signals and commands: obeyed by all ranks after one and the same step, and only from the run's owner."""

import io
import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from forgather.checkpoint.folder import saved_steps
from forgather.errors import ForgatherError
from forgather.metrics.console import Console
from forgather.optim.schedules import warmup_stable_decay
from forgather.trainers.commands import Command, Orders
from forgather.trainers.control import Control
from forgather.trainers.control_server import ControlServer
from forgather.trainers.control_socket import Address, ask, is_live, receive
from forgather.trainers.events import Hooks, Outcome
from forgather.trainers.reports import Reports
from forgather.trainers.trainer import Trainer
from tests.ranks import RankPool
from tests.trainers.small_run import make_trainer, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks():
    with RankPool(2) as pool:
        yield pool


class Asker:
    """Does something in the middle of a step, before its update: `what` is called on the rank that it is for."""

    def __init__(self, trainer: Trainer, control: Control, step: int) -> None:
        self.what: Any = lambda: None
        self.control = control
        self.answers: list[Any] = []
        self._threads: list[threading.Thread] = []
        trainer.state.optimizer.register_step_pre_hook(
            lambda *_: self.what() if trainer.steps_done + 1 == step else None
        )

    def asks(self, run: Path, command: str) -> None:
        """Give a command from another thread, as another process would, and be sure that the run has heard it."""
        thread = threading.Thread(target=self._ask, args=(run, command))
        thread.start()
        self._threads.append(thread)
        # The server reads in its own thread; what it has not read yet would count for the next step.
        while thread.is_alive() and not self._is_heard():
            thread.join(0.005)

    def _is_heard(self) -> bool:
        server = self.control._server
        return bool(server._waiting) or bool(self.answers)

    def _ask(self, run: Path, command: str) -> None:
        try:
            self.answers.append(ask(run, command, timeout_s=60))
        except ForgatherError as error:
            self.answers.append(str(error))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)


def controlled(folder, corpus, command, *, at=2, steps=6, rank_of_signal=None, hooks=None, **options):
    """Train, give `command` (or a signal) within step `at`; outcome, steps made, saved steps, answers."""
    from forgather.distributed.collectives import rank

    trainer = make_trainer(folder, corpus, steps=steps, **options)
    run = trainer.checkpoints.run
    control = trainer.control = Control(run, trainer.step.update.schedule)
    trainer.hooks = Hooks({"of control": control, **(hooks or {})})
    asker = Asker(trainer, control, at)
    if isinstance(command, signal.Signals):
        if rank() == rank_of_signal:
            asker.what = lambda: os.kill(os.getpid(), command)
    elif rank() == 0:
        asker.what = lambda: asker.asks(run.dir, command)
    outcome = trainer.run()
    asker.join()
    run.close()
    return outcome, trainer.steps_done, saved_steps(run.checkpoints), asker.answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_rank_stops_and_saves_all(number, two_ranks, tmp_path, corpus):
    results = two_ranks.run(controlled, tmp_path, corpus, number, rank_of_signal=1)
    # It came within step 2, so it travels with step 3.
    assert results == [(Outcome.STOPPED, 3, [3], [])] * 2


def test_in_a_world_of_one_the_step_under_way_is_the_last(tmp_path, corpus, capfd):
    assert controlled(tmp_path, corpus, signal.SIGTERM, rank_of_signal=0) == (Outcome.STOPPED, 2, [2], [])
    assert capfd.readouterr().err.startswith("\nSIGTERM: the run stops after its step, and saves\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.training_case(13)
@pytest.mark.parametrize(
    ("command", "outcome", "saved"),
    [("stop", Outcome.STOPPED, [3]), ("save-stop", Outcome.STOPPED, [3]), ("abort", Outcome.ABORTED, [])],
)
def test_a_command_ends_all_ranks_after_one_step(command, outcome, saved, two_ranks, tmp_path, corpus):
    first, second = two_ranks.run(controlled, tmp_path, corpus, command)
    assert first[:3] == second[:3] == (outcome, 3, saved)
    path = {"path": str(tmp_path / "run" / "checkpoints" / "step-00000003")} if command == "save-stop" else {}
    assert first[3] == [{"command": command, "step": 3, **path}]


def test_a_save_on_command_is_answered_when_it_is_whole(tmp_path, corpus):
    outcome, steps, saved, answers = controlled(tmp_path, corpus, "save")
    assert (outcome, steps, saved) == (Outcome.FINISHED, 6, [2, 6])
    assert answers == [{"command": "save", "step": 2, "path": str(tmp_path / "run" / "checkpoints" / "step-00000002")}]


def test_status_is_answered_at_once(tmp_path, corpus):
    _, _, _, (status,) = controlled(tmp_path, corpus, "status", at=3)
    assert (status["state"], status["step"], status["steps"]) == ("training", 2, 6)
    assert status["run"] == str(tmp_path / "run")
    assert status["loss"] == status["metrics"]["train"]["loss"]
    assert (status["ranks"], status["pid"]) == (1, os.getpid())


def test_a_schedule_without_a_decay_refuses_to_begin_one(tmp_path, corpus):
    outcome, *_, answers = controlled(tmp_path, corpus, "decay")
    assert outcome is Outcome.FINISHED
    assert "has no decay to begin" in answers[0]


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path, corpus):
    from tests.trainers.small_run import hash_of

    straight = make_trainer(tmp_path / "a", corpus, steps=6)
    straight.run()
    controlled(tmp_path / "b", corpus, signal.SIGTERM, rank_of_signal=0)
    resumed = make_trainer(tmp_path / "b", corpus, steps=6)
    assert resumed.resume() is not None
    resumed.run()
    assert hash_of(resumed) == hash_of(straight)


class Told:
    """A hook that would take its time, and notes at which steps it has it."""

    def __init__(self) -> None:
        self.leisure: list[int] = []

    def on_step_end(self, event) -> None:
        if not event.is_stopping:
            self.leisure.append(event.step)


@pytest.mark.parametrize("command", ["stop", "abort", signal.SIGTERM])
def test_hooks_hear_that_the_run_ends_before_they_take_their_time(command, tmp_path, corpus):
    told = Told()
    _, steps, *_ = controlled(tmp_path, corpus, command, at=3, rank_of_signal=0, hooks={"told": told})
    assert (steps, told.leisure) == (3, [1, 2])


def decayed(folder, corpus, *, steps=30, stop_at=None, say=None):
    """A run over a schedule that decays on command, over 4 steps; it is asked to within step 3, and again in step 5."""
    trainer = make_trainer(folder, corpus, steps=steps)
    update = trainer.step.update
    update.schedule = update.schedule_state = warmup_stable_decay(length=None, decay=4)
    control = trainer.control = Control(trainer.checkpoints.run, update.schedule)
    trainer.hooks = Hooks({"of control": control})
    trainer.reports = Reports(Console(steps, say), {})
    trainer.resume()
    asker = Asker(trainer, control, 3)
    asker.what = lambda: asker.asks(trainer.checkpoints.run.dir, "decay")
    again = Asker(trainer, control, 5)
    again.what = lambda: again.asks(trainer.checkpoints.run.dir, "decay")
    if stop_at is not None:
        Asker(trainer, control, stop_at).what = lambda: os.kill(os.getpid(), signal.SIGTERM)
    outcome = trainer.run()
    asker.join()
    again.join()
    trainer.checkpoints.run.close()
    return outcome, trainer.steps_done, asker.answers + again.answers


@pytest.mark.training_case(85)
def test_a_decay_on_command_ends_the_run_and_is_begun_once(tmp_path, corpus):
    said = io.StringIO()
    outcome, steps, answers = decayed(tmp_path, corpus, say=said)
    assert (outcome, steps) == (Outcome.FINISHED, 7)
    assert answers[0] == {"command": "decay", "step": 3}
    assert "the learning rate decays already, since 3 steps" in answers[1]
    lines = said.getvalue().splitlines()
    assert "the learning rate decays over the next 4 steps; step 7 is the last" in lines
    assert [line.partition(" | ")[0] for line in lines if line.startswith("step ") and "lr" in line] == [
        "step  1/30", "step  2/30", *(f"step {step}/7" for step in (3, 4, 5, 6, 7))
    ]  # fmt: skip


@pytest.mark.training_case(85)
def test_a_run_that_is_stopped_while_it_decays_ends_where_the_decay_does(tmp_path, corpus):
    assert decayed(tmp_path, corpus, stop_at=4)[:2] == (Outcome.STOPPED, 4)
    assert decayed(tmp_path, corpus, steps=30)[:2] == (Outcome.FINISHED, 7)


def test_steps_that_are_left_out_put_the_end_of_a_decay_off(tmp_path, corpus):
    trainer = make_trainer(tmp_path, corpus, steps=30)
    schedule = trainer.step.update.schedule = warmup_stable_decay(length=None, decay=4)
    for step in range(6):
        schedule(step)
    trainer.begin_decay()
    assert trainer.steps == 10
    trainer.step.update.watch.skipped += 2
    assert trainer.steps == 12
    trainer.checkpoints.run.close()


def test_orders_add_up():
    assert Orders.of({Command.SAVE_STOP}) == Orders(save=True, stop=True)
    assert Orders.of({Command.STOP, Command.DECAY}) == Orders(stop=True, decay=True)
    assert Orders.of(set()) == Orders()


@pytest.fixture
def server(tmp_path):
    """A server without a run behind it; its folder is a run folder."""
    (tmp_path / "checkpoints").mkdir()
    server = ControlServer(tmp_path, status=lambda: {"state": "training"}, refuse=lambda command: None)
    server.start()
    yield server
    server.close("the run ended")


def test_the_socket_is_its_owners_alone_and_goes_with_the_run(server, tmp_path):
    folder = tmp_path / ".control"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "socket").stat().st_mode & 0o777 == 0o600
    assert is_live(tmp_path)
    server.close("the run ended")
    assert not folder.exists()
    with pytest.raises(ForgatherError, match="no live run in"):
        ask(tmp_path, "status")


def raw(run: Path, line: bytes) -> dict[str, Any] | None:
    address = Address.read(run)
    assert address is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(address.socket)
        connection.sendall(line)
        connection.shutdown(socket.SHUT_WR)
        return receive(connection)


@pytest.mark.parametrize("line", [b"{]\n", b"[1]\n", b'{"command": ["stop"]}\n', b'{"command": "stpo"}\n', b"{}\n"])
def test_what_is_no_command_is_refused_and_harms_nothing(line, server, tmp_path):
    answer = raw(tmp_path, line)
    assert answer is not None
    assert answer["ok"] is False
    assert "command" in answer["error"]
    assert raw(tmp_path, b"half a lin") is None
    assert ask(tmp_path, "status") == {"state": "training"}


def test_whoever_waits_when_the_run_ends_is_told(server, tmp_path):
    errors: list[str] = []

    def save() -> None:
        try:
            ask(tmp_path, "save")
        except ForgatherError as error:
            errors.append(error.message)

    thread = threading.Thread(target=save)
    thread.start()
    while not server._waiting:
        thread.join(0.005)
    server.close("the run finished after step 9")
    thread.join(10)
    assert "the run finished after step 9, before it obeyed `save`" in errors[0]


def test_a_command_that_came_too_late_for_a_step_waits_for_the_next(server, tmp_path):
    threading.Thread(target=ask, args=(tmp_path, "decay")).start()
    while not server._waiting:
        pass
    server.obeyed(1, {Command.DECAY})  # another's: this one was not taken before the step
    assert server.take() == {Command.DECAY}
    server.obeyed(2, {Command.DECAY})
    assert server.take() == set()


def test_a_command_that_was_overtaken_by_its_like_is_told_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    begun: list[str] = []
    server = ControlServer(
        tmp_path, status=dict, refuse=lambda command: "it decays already" if command.value in begun else None
    )
    server.start()
    errors: list[str] = []

    def decay() -> None:
        try:
            ask(tmp_path, "decay", timeout_s=60)
        except ForgatherError as error:
            errors.append(error.message)

    thread = threading.Thread(target=decay)
    thread.start()
    while not server._waiting:
        thread.join(0.005)
    begun.append("decay")  # by one that came a step before
    assert server.take() == {Command.DECAY}
    server.obeyed(2, {Command.DECAY})
    thread.join(60)
    server.close("the run ended")
    assert "it decays already" in errors[0]


def test_a_socket_that_a_killed_run_has_left_is_replaced(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    folder = tmp_path / ".control"
    folder.mkdir(mode=0o777)
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(folder / "socket"))
    dead.close()
    Address(str(folder / "socket"), 1, socket.gethostname()).write(tmp_path)
    assert not is_live(tmp_path)
    with pytest.raises(ForgatherError, match="process 1 has ended without a word"):
        ask(tmp_path, "stop")
    server = ControlServer(tmp_path, status=lambda: {"state": "training"}, refuse=lambda command: None)
    server.start()
    assert ask(tmp_path, "status") == {"state": "training"}
    assert folder.stat().st_mode & 0o777 == 0o700
    server.close("the run ended")


def test_a_suspended_run_is_live_and_says_so_to_who_waits_for_a_while(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".control").mkdir()
    with socket.socket(socket.AF_UNIX) as suspended, socket.socket(socket.AF_UNIX) as waiting:
        suspended.bind(str(tmp_path / ".control" / "socket"))
        suspended.listen(0)  # and nobody accepts: one caller fills the queue
        Address(str(tmp_path / ".control" / "socket"), 1, socket.gethostname()).write(tmp_path)
        waiting.connect(str(tmp_path / ".control" / "socket"))
        assert is_live(tmp_path)
        with pytest.raises(ForgatherError, match="has not taken its last callers yet: process 1 is suspended"):
            ask(tmp_path, "status", timeout_s=1)


def test_a_path_that_is_too_long_for_a_socket_leads_elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    run = tmp_path / ("long" * 30)
    (run / "checkpoints").mkdir(parents=True)
    server = ControlServer(run, status=lambda: {"state": "training"}, refuse=lambda command: None)
    server.start()
    address = Address.read(run)
    assert address is not None
    assert not Path(address.socket).is_relative_to(run)
    assert Path(address.socket).parent.stat().st_mode & 0o777 == 0o700
    assert ask(run, "status") == {"state": "training"}
    server.close("the run ended")
    assert not Path(address.socket).parent.exists()


def test_a_run_on_another_host_says_where(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".control").mkdir()
    Address("/nowhere", 1, "elsewhere").write(tmp_path)
    with pytest.raises(ForgatherError, match="listens on elsewhere") as error:
        ask(tmp_path, "status")
    assert error.value.fix == "give the command on elsewhere"


def _as_nobody(run: Path, pipe: int) -> None:
    os.setgid(65534)
    os.setuid(65534)
    try:
        answer = json.dumps(ask(run, "stop", timeout_s=10))
    except ForgatherError as error:
        answer = str(error)
    os.write(pipe, answer.encode())
    os._exit(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("doors", ["as they are", "open"])
def test_another_user_is_not_heard(doors, server, tmp_path):
    # pytest's folders are the owner's alone; here the way to the run is open, as on a shared disk.
    for folder in [tmp_path, *tmp_path.parents[:-2]]:
        folder.chmod(0o755)
    if doors == "open":  # whatever happens to the modes, the kernel tells who calls
        (tmp_path / ".control").chmod(0o777)
        (tmp_path / ".control" / "socket").chmod(0o777)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _as_nobody(tmp_path, writing)
    os.close(writing)
    os.waitpid(pid, 0)
    answer = os.read(reading, 10_000).decode()
    os.close(reading)
    expected = "belongs to another user" if doors == "as they are" else "only the user who started this run"
    assert expected in answer
    assert server.take() == set()
