"""DiLoCo as a context manager around any PyTorch loop.

    with DiLoCo(model, optimizer, server="10.0.0.1:8512", worker="alpha", tokens_per_step=16384) as diloco:
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()            # after every H of them, this exchanges
            optimizer.zero_grad()
        diloco.finish()                 # and what was learned since

It hangs on the optimizer's steps and needs nothing else of the loop. Every rank of a distributed run makes one. What is
collective happens in the step, on the training thread; what waits for the network has threads of its own.

It is also a hook of Forgather's trainer, with a state that any mesh takes up.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from forgather.diloco import joining, worker_state
from forgather.diloco.address import ServerAddress, server_named
from forgather.diloco.flights import Waiting
from forgather.diloco.joining import Introduction, join
from forgather.diloco.lease_desk import LeaseDesk
from forgather.diloco.local_fragment import LocalFragment
from forgather.diloco.membership import Membership, require_parameters, require_same
from forgather.diloco.pulse import Pulse
from forgather.diloco.schedule import Schedule
from forgather.diloco.session import Session, leave
from forgather.diloco.settings import Settings
from forgather.diloco.slices import Holdings
from forgather.diloco.turns import Turns
from forgather.diloco.worker_state import Restored
from forgather.distributed.collectives import max_ranks, rank


class Logged(Protocol):
    """What a trainer tells when it has reported metrics."""

    @property
    def metrics(self) -> Mapping[str, float]: ...


class Started(Protocol):
    """What a trainer tells when its run begins: how many steps it is to have in the end."""

    @property
    def steps(self) -> int: ...


class Ending(Protocol):
    """What a trainer tells when its run ends with this step, before it saves."""

    @property
    def is_finished(self) -> bool: ...  # all its steps are made

    @property
    def is_stopping(self) -> bool: ...  # there may be seconds left for the save


class DiLoCo:
    """Trains `model` with others, through the server at `server`; without one it does nothing. Collective.

    `worker` names this machine, or this group of ranks, among the others, and `key_file` keeps what proves that it is
    the same worker when it comes again. Without a name it has that of its checkpoint, else `default_worker`, else the
    host's. `tokens_per_step`, over all ranks, is what a step weighs in the mean. `sync_every` may say the H that is
    expected; the server's is in force.

    New values are waited for without limit as long as the server answers. One that is out of reach for `patience_s` is
    not: training goes on, and what it makes is kept on top of the values when they come. `is_stopping` is asked while
    waiting: a run that is told to stop does not wait. It waits within a `waiting()`, for whoever keeps account of time.

    `package`, `tokenizer` and `data` are digests that must be equal on all machines. A `server` in words is spoken to
    with the token and the certificates that the environment names; a `ServerAddress` has its own. `num_rows` and
    `consumed` say which rows of the data have been trained on, where the server leases them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        server: str | ServerAddress | None = None,
        worker: str | None = None,
        *,
        default_worker: str | None = None,
        tokens_per_step: int = 1,
        sync_every: int | None = None,
        patience_s: float = 30.0,
        key_file: Path | None = None,
        mesh: str = "",
        package: str | None = None,
        tokenizer: str | None = None,
        data: str | None = None,
        is_stopping: Callable[[], bool] | None = None,
        waiting: Waiting = nullcontext,
        leases: LeaseDesk | None = None,
        num_rows: Callable[[], int] | None = None,
        consumed: Callable[[int, int], Mapping[str, int]] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.address = server_named(server) if isinstance(server, str) else server
        self.is_inert = self.address is None
        self.optimizer = optimizer
        self.tokens_per_step = tokens_per_step
        self.patience_s = patience_s
        self.steps = 0
        self.settings: Settings | None = None
        self._worker = worker
        self._default_worker = default_worker
        self._key_file = key_file
        self._key = ""
        self._expected_sync_every = sync_every
        self._digests = {"package": package, "tokenizer": tokenizer, "data": data}
        self._mesh = mesh
        self._is_stopping = is_stopping or (lambda: False)
        self._waiting = waiting
        self._leases = leases
        self._num_rows = num_rows or (lambda: 0)
        self._consumed = consumed
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._holdings = None if self.is_inert else Holdings(model, optimizer)
        self._fragments: list[LocalFragment] = []
        self._rows: dict[int, int] = {}  # of the data, trained on when a fragment was last sent
        self._restored: Restored | None = None
        self._schedule: Schedule | None = None
        self._membership: Membership | None = None
        self._session: Session | None = None
        self._hook: RemovableHandle | None = None
        self._pulse = Pulse(tokens_per_step)
        self._is_finished = False
        self._is_hook = False  # a trainer says when its run ends; else the loop does
        self._logged = (0.0, 0, 0)  # seconds waited and bytes moved at the last log

    # A context

    def __enter__(self) -> Self:
        """Come to the server, take its values where this worker has none of its own yet, and begin. Collective."""
        if self.is_inert:
            return self
        try:
            turns = self._join()
            if self._restored is None:
                turns.begin_anew(self.steps)
                if rank() == 0:
                    self._say(f"diloco: the weights are those of {self.address}, whatever they were before")
            else:
                turns.go_on(self._restored)
                self._restored = None
            self._hook = self.optimizer.register_step_post_hook(self._after_step)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Leave the server; first wait, as long as it is there, until it has all that was sent. Collective."""
        if self.is_inert:
            return
        try:
            if kind is None and self._session is not None:
                self._session.deliver(is_finished=self._is_finished)
                self._say_what_is_unsent(self._session.turns)
        finally:
            self._end()

    def finish(self) -> None:
        """The end of a run, before its last save: send what was learned since the last exchange, and take all in.

        Collective. With the server there, the parameters are then what it has.
        """
        if self._session is not None:
            turns = self._session.turns
            turns.settle(self.steps)  # a fragment has one exchange at a time
            turns.send_rest(self.steps)
            turns.settle(self.steps)
            self._is_finished = True

    def settle(self) -> None:
        """Wait for what is under way, and take it in. Collective.

        Without a step since it began, and with the server there, the parameters are then what the server has.
        """
        if self._session is not None:
            self._session.turns.settle(self.steps)

    # A hook of the trainer

    def on_start(self, event: Started) -> None:
        self._is_hook = True
        registered = None if self._membership is None else self._membership.registered
        warning = None if registered is None else joining.too_few_steps(registered, event.steps)
        if warning is not None and rank() == 0:
            self._say(warning)

    def on_logged(self, event: Logged) -> None:
        loss = event.metrics.get("loss")
        self.loss = None if loss is None else float(loss)

    def on_ending(self, event: Ending) -> None:
        """Send what was not sent, where nobody is to make it again. Collective.

        A run that is stopped keeps it: it goes on. One that a server drains may not, and others may have gone with what
        its rounds wait for, so it does not wait for them without end.
        """
        session = self._session
        if session is None or event.is_stopping:
            return
        if event.is_finished:
            self.finish()
        elif max_ranks(int(self._pulse.command == "drain")):
            session.turns.send_rest(self.steps)
            session.flights.deliver()
            session.flights.hurry()
            self.finish()

    @property
    def loss(self) -> float | None:
        """What is told to the server with the next heartbeat."""
        return self._pulse.loss

    @loss.setter
    def loss(self, loss: float | None) -> None:
        self._pulse.loss = loss

    def metrics(self) -> dict[str, float]:
        """The last version, seconds waited and millions of bytes moved by all ranks since the last log."""
        if self._session is None:
            return {}
        flights = self._session.flights
        (waited_s, up, down), self._logged = self._logged, (flights.waited_s, flights.bytes_up, flights.bytes_down)
        return {
            "round": float(max(fragment.number_of_version for fragment in self._fragments)),
            "sync_s": flights.waited_s - waited_s,
            "up_mb": (flights.bytes_up - up) / 1e6,
            "down_mb": (flights.bytes_down - down) / 1e6,
        }

    def wants_stop(self) -> bool:
        """Whether the server has asked this worker to save and stop; rank 0 hears it."""
        is_removed = self._membership is not None and self._membership.is_removed
        return is_removed or self._pulse.command in ("stop", "drain")

    def wants_abort(self) -> bool:
        """Whether the server has asked this worker to end without a save; rank 0 hears it."""
        return self._pulse.command == "abort"

    def wants_save(self) -> bool:
        """Whether the server has asked this worker to save, since this was asked last; rank 0 hears it."""
        return self._pulse.take_save()

    def state_dict(self) -> dict[str, Any]:
        """All that makes this the same worker after a restart, on any mesh; see `worker_state`."""
        if self.settings is None or self._schedule is None:
            return {}
        rows = self._rows if self._session is None else self._session.turns.rows
        under_way = {} if self._session is None else self._session.flights.under_way
        return {
            "key": self._key,
            "worker": self._worker,
            "steps": self.steps,
            "settings": self.settings.to_json(),
            "schedule": self._schedule.state_dict(),
            "rows": {str(number): count for number, count in rows.items()},
            **worker_state.capture(self._fragments, under_way),
        }

    def load_targets(self, saved: Mapping[str, Any], stored: Mapping[str, tuple[Any, Any]]) -> dict[str, Tensor]:
        """This rank's memory for the tensors of a saved state, by their paths."""
        if self.is_inert or not saved:
            return {}
        self._follow(Settings.from_json(saved["settings"]))
        self._restored = Restored(saved, self._fragments)
        return self._restored.targets(stored)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; what was read into `load_targets` is in it. ConfigError for another worker's."""
        if self._restored is None or self._schedule is None:
            return
        self._restored.accept(state)
        self._key, self.steps = state["key"], int(state["steps"])
        self._worker = joining.require_name(self._worker, state["worker"])
        self._schedule.load_state_dict(state["schedule"])
        self._rows = {int(number): int(rows) for number, rows in state["rows"].items()}

    # The beginning

    def _follow(self, settings: Settings) -> None:
        """Divide what this rank has by the server's settings."""
        assert self._holdings is not None, "only an inert one has none"
        require_parameters(settings, self._holdings.parameters)
        self._schedule = Schedule(settings)
        self.settings = settings
        self._fragments = [
            LocalFragment(number, names, self._holdings, upload=settings.upload)
            for number, names in enumerate(settings.fragments)
        ]

    def _join(self) -> Turns:
        """Come to the server; all ranks then know who they are and what holds."""
        assert self.address is not None, "only an inert one has none"
        assert self._holdings is not None, "only an inert one has none"
        who = Introduction(
            self._worker, self._key, self._key_file, self._mesh, self._digests, default=self._default_worker
        )
        is_known = self._restored is not None
        self._membership = join(
            self.address,
            who,
            patience_s=self.patience_s,
            may_be_away=is_known,
            trained=self._holdings.parameters,
            say=self._say,
            is_stopping=self._is_stopping,
        )
        self._key, self._worker = self._membership.request.key, self._membership.request.worker
        if self._leases is not None:
            self._leases.join(self._membership, self._say)
        if self._membership.registered is not None:
            self._adopt(self._membership.registered.settings)
        assert self.settings is not None, "it is the server's, or that of the checkpoint"
        assert self._schedule is not None, "it goes with the settings"
        self._session = Session(
            self._membership,
            self.settings,
            self._fragments,
            self._schedule,
            self._pulse,
            patience_s=self.patience_s,
            is_stopping=self._is_stopping,
            waiting=self._waiting,
            say=self._say,
            tokens_per_step=self.tokens_per_step,
            rows=self._rows,
            num_rows=self._num_rows,
            consumed=self._consumed,
        )
        if rank() == 0:
            self._say(self.describe())
        return self._session.turns

    def _adopt(self, settings: Settings) -> None:
        """Let the settings that the server has now be in force, as far as a worker can go on under them."""
        joining.require_expected(settings, self._expected_sync_every, is_leased=self._leases is not None)
        if self._leases is None and settings.work_units and rank() == 0:
            self._say(
                "diloco: the server leases rows, and this run takes its own: give each worker other ones, by a seed of "
                "its own for example, or all train on the same"
            )
        if self.settings is None or self._schedule is None:
            self._follow(settings)
            return
        require_same(self.settings, settings)
        self._schedule.next_sync_every = settings.sync_every
        self._schedule.next_round_seconds = settings.round_seconds
        self.settings = settings

    # A step

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002  what torch passes
        assert self._session is not None, "it has joined"
        self._pulse.pace.step_ended()
        self._pulse.steps = self.steps = self.steps + 1
        self._is_finished = False
        self._session.turns.after_step(self.steps)
        if not self._is_hook:  # a trainer asks by itself
            self._session.require_place()
        self._pulse.pace.step_begins()

    # The end

    def _say_what_is_unsent(self, turns: Turns) -> None:
        """In a loop of one's own: a trainer says itself when its run ends, and what it stops goes on some day."""
        unsent = turns.num_unsent(self.steps)
        if rank() == 0 and unsent and not self._is_hook and not self._is_finished:
            self._say(f"note: the last {unsent} steps were not sent to the server; call finish() where a run ends")

    def _end(self) -> None:
        """Let go of the optimizer, the threads and the server, whatever state they are in."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._leases is not None:
            self._leases.leave()
        if self._session is not None:
            self._session.close()
        if self._membership is not None:
            leave(self._membership, self._say)

    def describe(self) -> str:
        """One line: where the server is, who this is to it, and what it has set."""
        assert self.settings is not None, "it has begun"
        assert self._membership is not None, "it has begun"
        return joining.describe(self._membership, self.settings)
