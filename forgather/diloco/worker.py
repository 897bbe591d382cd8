"""DiLoCo as a context manager around any PyTorch loop.

    with DiLoCo(model, optimizer, server="10.0.0.1:8512", worker="alpha", tokens_per_step=16384) as diloco:
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()            # after every H of them, this exchanges
            optimizer.zero_grad()

It hangs on the optimizer's steps and needs nothing else of the loop. Every rank of a distributed run makes one. What is
collective happens in the step, on the training thread; what waits for the network has threads of its own.

It is also a hook of Forgather's trainer, with a state that any mesh takes up.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from forgather.diloco import worker_state
from forgather.diloco.address import ServerAddress, server_named
from forgather.diloco.exchange import Exchange
from forgather.diloco.flight import Flight, take_off
from forgather.diloco.flights import Flights
from forgather.diloco.joining import Introduction, join
from forgather.diloco.lease_desk import LeaseDesk
from forgather.diloco.local_fragment import LocalFragment
from forgather.diloco.membership import Heartbeats, Membership, require_parameters, require_same
from forgather.diloco.messages import Beat, Heartbeat, Settings
from forgather.diloco.schedule import Schedule
from forgather.diloco.slices import Holdings
from forgather.diloco.worker_state import Restored
from forgather.distributed import collectives
from forgather.distributed.collectives import rank
from forgather.errors import ConfigError, ForgatherError


class Logged(Protocol):
    """What a trainer tells when it has reported metrics."""

    @property
    def metrics(self) -> Mapping[str, float]: ...


class DiLoCo:
    """Trains `model` with others, through the server at `server`; without one it does nothing. Collective.

    `worker` names this machine, or this group of ranks, among the others (the host's name where nothing is said), and
    `key_file` keeps what proves that it is the same worker when it comes again. `tokens_per_step`, over all ranks, is
    what a step weighs in the mean. `sync_every` may say the H that is expected; the server's is in force.

    New values are waited for without limit as long as the server answers. One that is out of reach for `patience_s` is
    not: training goes on, and what it makes is kept on top of the values when they come. `is_stopping` is asked while
    waiting: a run that is told to stop does not wait.

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
        tokens_per_step: int = 1,
        sync_every: int | None = None,
        patience_s: float = 30.0,
        key_file: Path | None = None,
        mesh: str = "",
        package: str | None = None,
        tokenizer: str | None = None,
        data: str | None = None,
        is_stopping: Callable[[], bool] | None = None,
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
        self.loss: float | None = None  # told to the server with the next heartbeat
        self.settings: Settings | None = None
        self._worker = worker
        self._key_file = key_file
        self._key = ""
        self._expected_sync_every = sync_every
        self._digests = {"package": package, "tokenizer": tokenizer, "data": data}
        self._mesh = mesh
        self._is_stopping = is_stopping or (lambda: False)
        self._leases = leases
        self._num_rows = num_rows or (lambda: 0)
        self._consumed = consumed
        self._say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._holdings = None if self.is_inert else Holdings(model, optimizer)
        self._fragments: list[LocalFragment] = []
        self._flights: Flights | None = None
        self._rows: dict[int, int] = {}  # of the data, trained on when a fragment was last sent
        self._restored: Restored | None = None
        self._schedule: Schedule | None = None
        self._membership: Membership | None = None
        self._heartbeats: Heartbeats | None = None
        self._hook: RemovableHandle | None = None
        self._command: Literal["save", "stop", "abort"] | None = None
        self._pace = (0, time.monotonic())  # steps and time of the last heartbeat
        self._logged = (0.0, 0, 0)  # seconds waited and bytes moved at the last log

    # A context

    def __enter__(self) -> Self:
        """Come to the server, take its values where this worker has none of its own yet, and begin. Collective."""
        if self.is_inert:
            return self
        try:
            self._join()
            if self._restored is None:
                self._take_first_values()
            else:
                self._go_on(self._restored)
            self._hook = self.optimizer.register_step_post_hook(self._after_step)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Leave the server; first wait, as long as it is there, until it has all that was learned. Collective."""
        if self.is_inert:
            return
        try:
            if kind is None and self._flights is not None:
                self._flights.deliver()
        finally:
            self._end()

    def finish(self) -> None:
        """Wait for what is under way, and take it in. Collective.

        Without a step since it began, and with the server there, the parameters are then what the server has.
        """
        if self._flights is not None:
            self._flights.wait_again()
            self._flights.attend(self.steps, 0)

    # A hook of the trainer

    def on_logged(self, event: Logged) -> None:
        loss = event.metrics.get("loss")
        self.loss = None if loss is None else float(loss)

    def metrics(self) -> dict[str, float]:
        """The last version, seconds waited and millions of bytes moved by all ranks since the last log."""
        flights = self._flights
        if flights is None:
            return {}
        (waited_s, up, down), self._logged = self._logged, (flights.waited_s, flights.bytes_up, flights.bytes_down)
        return {
            "round": float(max(fragment.number_of_version for fragment in self._fragments)),
            "sync_s": flights.waited_s - waited_s,
            "up_mb": (flights.bytes_up - up) / 1e6,
            "down_mb": (flights.bytes_down - down) / 1e6,
        }

    def wants_stop(self) -> bool:
        """Whether the server has asked this worker to save and stop; rank 0 hears it."""
        return self._command == "stop"

    def wants_abort(self) -> bool:
        """Whether the server has asked this worker to end without a save; rank 0 hears it."""
        return self._command == "abort"

    def wants_save(self) -> bool:
        """Whether the server has asked this worker to save, since this was asked last; rank 0 hears it."""
        wanted = self._command == "save"
        if wanted:
            self._command = None
        return wanted

    def state_dict(self) -> dict[str, Any]:
        """All that makes this the same worker after a restart, on any mesh; see `worker_state`."""
        if self.settings is None or self._schedule is None:
            return {}
        return {
            "key": self._key,
            "worker": self._worker,
            "steps": self.steps,
            "settings": self.settings.to_json(),
            "schedule": self._schedule.state_dict(),
            "rows": {str(number): rows for number, rows in self._rows.items()},
            **worker_state.capture(self._fragments, {} if self._flights is None else self._flights.under_way),
        }

    def load_targets(self, saved: Mapping[str, Any], stored: Mapping[str, tuple[Any, Any]]) -> dict[str, Tensor]:
        """This rank's memory for the tensors of a saved state, by their paths."""
        if self.is_inert or not saved:
            return {}
        self._follow(Settings.from_json(saved["settings"]))
        self._restored = Restored(saved, self._fragments)
        return self._restored.targets(stored)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; what was read into `load_targets` is in it."""
        if self._restored is None or self._schedule is None:
            return
        self._restored.accept(state)
        self._key, self.steps = state["key"], int(state["steps"])
        self._worker = self._worker or state["worker"]
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

    def _join(self) -> None:
        """Come to the server; all ranks then know who they are and what holds."""
        assert self.address is not None, "only an inert one has none"
        who = Introduction(self._worker, self._key, self._key_file, self._mesh, self._digests)
        is_known = self._restored is not None
        self._membership = join(self.address, who, patience_s=self.patience_s, may_be_away=is_known, say=self._say)
        self._key, self._worker = self._membership.request.key, self._membership.request.worker
        if self._leases is not None:
            self._leases.join(self._membership)
        if self._membership.registered is not None:
            self._adopt(self._membership.registered.settings)
        assert self.settings is not None, "it is the server's, or that of the checkpoint"
        self._membership.settings = self.settings
        self._flights = Flights(
            self._membership,
            self.settings,
            patience_s=self.patience_s,
            is_stopping=self._is_stopping,
            failure=lambda: None if self._heartbeats is None else self._heartbeats.failure,
            say=self._say,
        )
        if rank() == 0:
            if self.settings.heartbeat_s > 0:
                self._heartbeats = Heartbeats(self._membership, self.settings.heartbeat_s, self._tell, self._hear)
            self._say(self.describe())

    def _adopt(self, settings: Settings) -> None:
        expected = self._expected_sync_every
        if expected is not None and expected != settings.sync_every:
            raise ConfigError(
                f"the server has sync_every {settings.sync_every}, and this worker was given {expected}",
                fix=f"leave out --sync-every: the server's is in force; or start the server with {expected}",
            )
        if self._leases is not None and not settings.work_units:
            raise ConfigError(
                "this run wants its rows leased, and the server leases none",
                fix="--diloco-leased false, and a --seed for each worker; or start the server with --work-units 1024, say",
            )
        if self._leases is None and settings.work_units and rank() == 0:
            self._say("diloco: the server leases rows, and this run takes its own: others may train on the same ones")
        if self.settings is None or self._schedule is None:
            self._follow(settings)
            return
        require_same(self.settings, settings)
        self._schedule.next_sync_every = settings.sync_every
        self.settings = settings

    def _take_first_values(self) -> None:
        """Begin with the values that the server has now."""
        assert self._flights is not None, "it has joined"
        assert self._membership is not None, "it has joined"
        assert self._membership.registered is not None, "without a checkpoint the server has answered"
        for fragment, version in zip(self._fragments, self._membership.registered.versions, strict=True):
            exchange = Exchange(fragment, self._membership, version.number, at_least=version.number)
            self._flights.add(Flight(fragment, exchange, self.steps))
        self._flights.attend(self.steps, 0, is_needed=True)
        if rank() == 0:
            self._say(f"diloco: the weights are those of {self.address}, whatever they were before")

    def _go_on(self, restored: Restored) -> None:
        """Take up the exchanges that were under way when the checkpoint was saved."""
        for key, saved in restored.flights.items():
            number = int(key)
            is_same = collectives.agree(restored.is_of_this_mesh(number))
            # fp32 is encoded again, from the same numbers; what a codec has made, its losses noted, is sent as it is.
            is_bound = not is_same and self._fragments[number].upload != "fp32"
            self._take_off(
                number,
                saved,
                sent=restored.sent[number],
                parts=restored.parts.get(number, ()) if is_same or is_bound else (),
                is_encoded_elsewhere=is_bound,
            )
        self._restored = None

    # A step

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002  what torch passes
        self.steps += 1
        assert self._flights is not None, "it has joined"
        assert self._schedule is not None, "it has joined"
        assert self.settings is not None, "it has joined"
        due = self._schedule.due(self.steps)
        if due in self._flights.under_way:
            self._flights.attend(self.steps, self.settings.delay)
        if due is not None and due not in self._flights.under_way:
            self._begin(due)  # what is under way even now keeps its turn; what was made meanwhile goes with the next
        self._flights.attend(self.steps, self.settings.delay)
        self._schedule.next_sync_every = self._flights.agreed_sync_every or self._schedule.next_sync_every

    def _begin(self, number: int) -> None:
        """Send what was learned since the fragment was last sent."""
        fragment = self._fragments[number]
        steps = self.steps - fragment.since
        rows, before = self._num_rows(), self._rows.get(number, 0)
        saved = {
            "round": fragment.number_of_version,
            "begun": self.steps,
            "tokens": max(1, steps * self.tokens_per_step),
            "steps": steps,
            # Each row is told of once: with the first of the fragments.
            "consumed": {} if self._consumed is None or number > 0 else self._consumed(before, rows),
        }
        self._take_off(number, saved, sent=fragment.snapshot())
        fragment.since, self._rows[number] = self.steps, rows

    def _take_off(self, number: int, saved: Mapping[str, Any], **others: Any) -> None:
        assert self._flights is not None, "it has joined"
        assert self._membership is not None, "it has joined"
        assert self.settings is not None, "it has joined"
        self._flights.add(take_off(self._fragments[number], self._membership, self.settings, **saved, **others))

    # The end

    def _end(self) -> None:
        """Let go of the optimizer, the threads and the server, whatever state they are in."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._flights is not None:
            self._flights.close()
        if self._heartbeats is not None:
            self._heartbeats.close()
            self._heartbeats = None
        if self._membership is not None:
            if rank() == 0 and self._membership.registered is not None:
                self._leave()
            self._membership.close()

    def _leave(self) -> None:
        """Tell the server that nobody needs to wait for this worker."""
        assert self._membership is not None, "it has registered"
        client = self._membership.borrow()
        try:
            client.leave()
        except ForgatherError as error:
            # Its lease runs out by itself; the run has its own end, which is not to be this.
            self._say(f"note: could not take leave of the server: {error.message}")
        finally:
            client.close()

    # What is told

    def describe(self) -> str:
        """One line: where the server is, who this is to it, and what it has set."""
        settings = self.settings
        assert settings is not None, "it has begun"
        pace = f"every {settings.sync_every} steps"
        if settings.round_seconds is not None:
            pace = f"every {settings.round_seconds:g} s"
        elif settings.dylu:
            pace = f"every {settings.sync_every} steps or fewer, by speed"
        fragments = f"{len(settings.fragments)} fragments" if len(settings.fragments) > 1 else "all at once"
        delay = f", {settings.delay} steps late, alpha {settings.alpha:g}" if settings.delay else ""
        versions = self._membership.registered.versions if self._membership and self._membership.registered else ()
        there = f", at version {max(version.number for version in versions)}" if versions else ", not reached yet"
        return (
            f"diloco: worker {self._worker} of {self.address}{there}: {settings.mode}, {pace}, {fragments}{delay}, "
            f"{settings.upload} up, {settings.download} down"
        )

    def _tell(self) -> Heartbeat:
        (steps, at), now = self._pace, time.monotonic()
        done, self._pace = self.steps, (self.steps, now)
        steps_per_s = (done - steps) / max(1e-9, now - at) if done > steps else None
        tokens_per_s = None if steps_per_s is None else steps_per_s * self.tokens_per_step
        return Heartbeat(done, steps_per_s, tokens_per_s, self.loss)

    def _hear(self, beat: Beat) -> None:
        if self._flights is not None:
            self._flights.wanted_sync_every = beat.sync_every
        if beat.command is not None:
            self._command = beat.command
