"""The server of a run, without its network: who is there, what has come, when a round closes, what is on the disk.

Everything that decides runs on one event loop. What takes time runs in threads: contributions are looked through in
some, outer steps and saving in one, one after the other. So heartbeats and status are answered whatever the disk does.

    register / beat / leave           members
    verdict, receive                  contributions (`intake`)
    answer                            values, waited for
    _close                            outer step, save or journal, publish
    save drain kick shutdown set command      what an operator may do
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, Self, cast

import torch
import xxhash
from torch import Tensor

from forgather.checkpoint.keep import Keep
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.storage import raw_bytes
from forgather.checkpoint.store import CheckpointStore
from forgather.diloco.combine import Guard, Share, combine, lineage, shares
from forgather.diloco.contribution import Held
from forgather.diloco.fragment_values import Answer, FragmentValues
from forgather.diloco.intake import Intake
from forgather.diloco.ledger import Ledger
from forgather.diloco.members import Command, Member, Members
from forgather.diloco.messages import (
    Beat,
    Contribution,
    Heartbeat,
    ProtocolError,
    Register,
    Registered,
    Settings,
    Version,
    WantValues,
)
from forgather.diloco.outer import staleness_weight
from forgather.diloco.rounds import Rounds
from forgather.diloco.server_state import Journal, OuterState, ServerState
from forgather.diloco.spool import Spool
from forgather.errors import CheckpointError, ConfigError

HISTORY = 200
RETRY_S = 2.0  # after a disk has refused to save
_TICK_S = 0.25


class OuterOptimizer(OuterState, Protocol):
    """What the coordinator needs of an outer optimizer."""

    def require_parameters(self, parameters: Mapping[str, Sequence[int]]) -> None: ...

    def step(self, name: str, master: Tensor, mean: Tensor) -> None: ...


class StoppingError(Exception):
    """The server ends while something was still to be done, which then was not."""


class Coordinator:
    """Coordinates the training of one model, whose state is in the run folder `run`.

    `values` are the parameters of `settings` to begin with, made fp32 where they are not; with a checkpoint in the
    folder its values are taken instead. `constants` are what else the model has (buffers), saved with it as they are.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        settings: Settings,
        outer: OuterOptimizer,
        run: RunFolder,
        *,
        num_workers: int,
        min_workers: int = 1,
        round_timeout_s: float | None = None,
        save_every: int = 1,
        keep: Keep | None = None,
        guard: Guard | None = None,
        constants: Mapping[str, Tensor] | None = None,
        spool_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        staleness: Callable[[int], float] = staleness_weight,
    ) -> None:
        if save_every < 1:
            raise ConfigError(f"save_every is {save_every}", fix="--save-every 1, or another whole number from 1")
        _require_parameters(values, settings)
        outer.require_parameters(settings.parameters)
        self.settings = settings
        self.outer = outer
        self.run = run
        self.save_every = save_every
        self.guard = guard or Guard()
        self.draining = False
        self.stopped = asyncio.Event()
        self.trouble: str | None = None  # why it cannot save at the moment
        self.num_refused = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.ledger = Ledger(settings.work_units) if settings.work_units else None
        self._clock = clock
        self._staleness = staleness
        self._started_at = clock()
        self.fragments = [_fragment(values, names, settings.download) for names in settings.fragments]
        self.members = Members(settings.lease_s, clock)
        self.rounds = Rounds(
            [fragment.version for fragment in self.fragments],
            self.members,
            clock,
            num_workers=num_workers,
            min_workers=min_workers,
            round_timeout_s=round_timeout_s,
            mode=settings.mode,
        )
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="check")
        self._outer_thread = ThreadPoolExecutor(1, thread_name_prefix="outer")
        folder = run.dir / "spool"
        folder.mkdir(exist_ok=True)
        budget = _spool_budget(self.fragments) if spool_bytes is None else spool_bytes
        self.spool = Spool(folder, budget, self._threads.submit)
        self.intake = Intake(settings, self.fragments, self.rounds, self.spool, self._threads, self.until)
        self._closing: tuple[int, Version] | None = None
        self._unsaved = 0  # versions since the last save
        self._later: dict[str, float] = {}  # settings of the outer optimizer that wait for the end of its step
        self._changed = asyncio.Condition()
        self._woken = asyncio.Event()
        self._lock = asyncio.Lock()  # over outer steps and saving
        self._tasks: list[asyncio.Task[None]] = []
        self._state = ServerState(
            self.fragments,
            outer,
            constants or {},
            self._document,
            self._accept_document,
            {} if self.ledger is None else {"work_units": self.ledger},
        )
        self._store = CheckpointStore(run, keep, asynchronous=False)
        self._journal = Journal(run.dir / "journal.jsonl")
        self._load()

    # --- members

    def register(self, request: Register) -> Registered:
        """Take a worker in. ProtocolError where its data or model are others', or its name is a live worker's."""
        if self.draining:
            raise ProtocolError("the server takes no new workers: it is being shut down", status=503)
        self._require_same(request)
        before = self.members.get(request.worker)
        outcome = self.members.register(request)
        member = self.members[request.worker]
        if outcome == "another" and before is not None:
            retired = f"{request.worker}~{before.key_digest[:8]}"  # no worker can have such a name
            self.rounds.renamed(request.worker, retired)
            self.intake.renamed(request.worker, retired)
        self.rounds.came(request.worker)
        if self.ledger is not None:
            self.ledger.begin(request.worker, member.key_digest)
        if outcome != "again":
            self.run.say(f"worker {member.name} of {member.host or 'an unnamed host'} is here ({outcome})")
        self.wake()
        return Registered(self.settings, [fragment.version for fragment in self.fragments])

    def beat(self, worker: str, key: str, heartbeat: Heartbeat) -> Beat:
        """A worker lives."""
        return self.members.beat(worker, key, heartbeat, self.sync_every)

    def leave(self, worker: str, key: str) -> None:
        """A worker has done what it wanted to do; what is complete of it counts."""
        self.members.require(worker, key)
        self.members.remove(worker, "left")
        self._gone(worker, "has left")

    def sync_every(self, member: Member) -> int:
        """How many inner steps this worker makes to an exchange, by its speed where settings say so."""
        most, least = self.settings.sync_every, len(self.fragments)
        speed = member.steps_per_s
        if self.settings.round_seconds is not None and speed:
            return max(least, int(speed * self.settings.round_seconds))
        fastest = max((other.steps_per_s or 0.0 for other in self.members.live()), default=0.0)
        if self.settings.dylu and speed and fastest:
            return min(most, max(least, int(speed / fastest * most)))
        return most

    def _gone(self, worker: str, how: str) -> None:
        self.run.say(f"worker {worker} {how}")
        if how != "is dead: no heartbeat":  # who is dead may come back to the same round
            self.rounds.left(worker)
        if self.ledger is not None:
            self.ledger.release(worker)
        self.wake()

    def _require_same(self, request: Register) -> None:
        for name in ("package", "tokenizer", "data"):
            ours, theirs = getattr(self.settings, name), getattr(request, name)
            if ours is not None and theirs is not None and ours != theirs:
                raise ProtocolError(
                    f"the {name} of {request.worker} is {theirs}, that of this run is {ours}",
                    status=422,
                    fix="take package and tokenizer from the server, and prepare the same dataset on all machines",
                )
        said = {
            name: getattr(request, name)
            for name in ("package", "tokenizer", "data")
            if getattr(self.settings, name) is None and getattr(request, name) is not None
        }
        if said:
            self.settings = self.intake.settings = replace(self.settings, **said)

    # --- contributions and values

    def check(self, header: Contribution) -> None:
        """ProtocolError unless what a contribution says of work units can be counted."""
        if self.ledger is not None:
            self.ledger.check(header.consumed)

    async def answer(self, fragment: int, want: WantValues) -> Answer | None:
        """What to send for `want`, once there is a version that it takes; None when there was none for `wait_s`."""
        self.rounds.require_fragment(fragment)
        there = self.fragments[fragment]
        there.require(want)
        is_there = await self.until(lambda: not there.is_moving and there.version.number >= want.at_least, want.wait_s)
        if not is_there:
            return None
        answer = await asyncio.get_running_loop().run_in_executor(self._threads, there.answer, want)
        return answer if answer.is_current and not there.is_moving else await self.answer(fragment, want)

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until something that is told of makes `condition` true, but not longer than so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: condition() or self.stopped.is_set())
        return condition()

    def wake(self) -> None:
        """Look whether a round is to be closed."""
        self._woken.set()

    # --- rounds

    async def __aenter__(self) -> Self:
        if self.ledger is not None:
            self.ledger.open(self.run.dir / "leases.jsonl")
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._close_rounds())]
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Let the outer step that is under way end, save what is not saved, and give back what was taken."""
        self.stopped.set()
        self.wake()
        await self._tell()
        try:
            await asyncio.gather(*self._tasks)
            if self.trouble is None:
                await self._on_outer_thread(self._save)
        finally:
            for fragment in range(len(self.fragments)):
                for held in self.intake.waiting(fragment):
                    held.release()
            self._threads.shutdown()
            self._outer_thread.shutdown()
            self._store.close()
            if self.ledger is not None:
                self.ledger.close()

    async def _watch(self) -> None:
        """Notice who is dead, and deadlines."""
        while not self.stopped.is_set():
            for worker in self.members.expire():
                self._gone(worker, "is dead: no heartbeat")
            deadline = self.rounds.next_deadline()
            if deadline is not None and self._clock() >= deadline:
                self.wake()
            if self.draining and not self.members.live():
                self.stopped.set()
                self.wake()
                await self._tell()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), _TICK_S)

    async def _close_rounds(self) -> None:
        while not self.stopped.is_set():
            await self._woken.wait()
            self._woken.clear()
            for fragment in range(len(self.fragments)):
                while not self.stopped.is_set() and (contributors := self.rounds.due(fragment)):
                    try:
                        async with self._lock:
                            await self._close(fragment, contributors)
                    except StoppingError:
                        return
                    except Exception as error:
                        # The master values may be half of a new version: whoever starts it again goes on from the disk.
                        self.trouble = f"the outer step failed: {error}"
                        self.stopped.set()
                        await self._tell()
                        raise

    async def _close(self, fragment: int, contributors: Sequence[tuple[str, int]]) -> None:
        """Make the next version of a fragment, and publish it when it cannot be lost any more."""
        began = time.perf_counter()
        self._apply_later()
        there, before = self.fragments[fragment], self.fragments[fragment].version
        helds = [self.intake.held(fragment, *each) for each in contributors]
        opened_at = self.rounds.rounds[fragment].opened_at
        self.rounds.close(fragment, contributors)
        there.begin()
        taken = shares(helds, self.guard)
        damping = 1.0
        if self.settings.mode == "async":
            damping = self._staleness(max(0, before.number - helds[0].header.base.number))
        await self._on_outer_thread(
            lambda: combine(taken, there.master, there.published, self.outer, there.change, damping=damping)
        )
        version = Version(before.number + 1, lineage(before.lineage, taken))
        self._note(fragment, version, helds, taken, self._clock() - opened_at)
        self._closing, self._state.moving = (fragment, version), fragment
        is_saved = self._unsaved + 1 >= self.save_every
        await self._retried(self._save if is_saved else lambda: self._journal.add(fragment, version, contributors))
        there.move_begins()
        await self._on_outer_thread(there.move)
        there.moved(version, before)
        self._closing = self._state.moving = None
        self._unsaved = 0 if is_saved else self._unsaved + 1
        if is_saved:
            self._mark_durable()
        self.rounds.published(fragment, version)
        for held in helds:
            self.intake.drop(fragment, held.worker, held.round)
        self.intake.drop_past(fragment)
        self.history[-1]["outer_s"] = round(time.perf_counter() - began, 4)
        await self._tell()

    def _note(
        self, fragment: int, version: Version, helds: Sequence[Held], taken: Sequence[Share], seconds: float
    ) -> None:
        """What the history, the members and the ledger know of a version."""
        names = {share.held.worker for share in taken}
        for held in helds:
            if self.ledger is not None:
                tell = self.ledger.count if held.worker in names else self.ledger.refuse
                tell(held.worker, held.consumed)
            if held.worker not in names:
                self.num_refused += 1
                self.run.say(f"{held.worker}'s contribution to round {held.round} is left out: norm {held.norm:.3g}")
        losses = [
            (held.header.tokens, member.loss)
            for held in helds
            if held.worker in self.members and (member := self.members[held.worker]).loss is not None
        ]
        tokens = sum(held.header.tokens for held in helds)
        self.history.append(
            {
                "fragment": fragment,
                "version": version.number,
                "workers": [held.worker for held in helds],
                "refused": [held.worker for held in helds if held.worker not in names],
                "clipped": [share.held.worker for share in taken if share.scale < 1],
                "tokens": tokens,
                "norm": max(share.held.norm for share in taken),
                "seconds": round(seconds, 4),
                "loss": sum(weight * (loss or 0.0) for weight, loss in losses) / sum(weight for weight, _ in losses)
                if losses
                else None,
                "time": time.time(),
            }
        )

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _on_outer_thread(self, call: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._outer_thread, call)

    # --- what is on the disk

    @property
    def step(self) -> int:
        """How many versions were made, over all fragments: the step of a checkpoint."""
        moving = 0 if self._closing is None else 1
        return sum(fragment.version.number for fragment in self.fragments) + moving

    def _save(self) -> None:
        self._store.save(cast(TrainState, self._state), self.step)
        self._journal.clear()

    async def _retried(self, write: Callable[[], object]) -> None:
        """Write, again and again where the disk refuses. StoppingError when the server is to end before."""
        while True:
            try:
                await self._on_outer_thread(write)
            except (CheckpointError, OSError) as error:
                text = str(error)
                if text != self.trouble:
                    self.trouble = text
                    self.run.say(f"warning: {text}; trying again every {RETRY_S:g} s")
            else:
                self.trouble = None
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), RETRY_S)
            if self.stopped.is_set():
                raise StoppingError

    def _mark_durable(self) -> None:
        for fragment in self.fragments:
            fragment.durable = fragment.version.number

    def _document(self) -> dict[str, Any]:
        """The state that is no tensor, as it is to be after a restart."""
        return {
            "fragments": [list(names) for names in self.settings.fragments],
            "download": self.settings.download,
            "mode": self.settings.mode,
            "members": self.members.state_dict(),
            "rounds": self.rounds.state_dict(*(self._closing or ())),
            "history": list(self.history),
            "said": {name: getattr(self.settings, name) for name in ("package", "tokenizer", "data")},
        }

    def _accept_document(self, document: Mapping[str, Any]) -> None:
        for name in ("fragments", "download", "mode"):
            ours = getattr(self.settings, name)
            ours = [list(names) for names in ours] if name == "fragments" else ours
            if document[name] != ours:
                shown = f"{len(document[name])} other" if name == "fragments" else document[name]
                raise CheckpointError(
                    f"the state in {self.run.dir} is of a server with {shown} {name}",
                    fix="start it with the settings that it had, or give another folder",
                )
        self.members.load_state_dict(document["members"])
        self.rounds.load_state_dict(document["rounds"])
        self.history.extend(document["history"])
        for fragment, there in zip(self.fragments, self.rounds.rounds, strict=True):
            fragment.version = there.version
        said = {name: value for name, value in document["said"].items() if getattr(self.settings, name) is None}
        self.settings = self.intake.settings = replace(self.settings, **said)

    def _load(self) -> None:
        """Go on from the newest checkpoint, and let the rounds since then be made again; or save what it begins with.

        A start is saved too: a server that is started again begins with the same values, whatever has become of the
        model's folder.
        """
        newest = self._store.resume(cast(TrainState, self._state))  # it has what a store needs of one
        if newest is None:
            self._save()
            return
        self._mark_durable()
        again = self._journal.after([fragment.version for fragment in self.fragments])
        for fragment, closed in enumerate(again):
            self.rounds.replay(fragment, closed)
        num_again = sum(map(len, again))
        self.run.say(
            f"going on from {newest.path}"
            + (f"; {num_again} rounds since then are to be made again" if num_again else "")
        )

    # --- what an operator may do

    async def save(self) -> int:
        """Save now; returns the step. Nothing is written where nothing is new."""
        if self.trouble is not None:
            raise ProtocolError(f"it cannot save: {self.trouble}", status=507)
        async with self._lock:
            try:
                await self._on_outer_thread(self._save)
            except CheckpointError as error:
                raise ProtocolError(error.message, status=507, fix=error.fix) from error
            self._unsaved = 0
            self._mark_durable()
            return self.step

    def drain(self) -> None:
        """Take nobody in any more, tell all workers to save and stop, and end when they have left."""
        self.draining = True
        self.members.command(None, "stop")

    def kick(self, worker: str) -> None:
        """Take a worker out at once, with what it has sent for open rounds; its process is told to stop."""
        self.members.remove(worker, "kicked")
        for held in self.intake.drop_all_of(worker).values():
            if self.ledger is not None:
                self.ledger.refuse(worker, held.consumed)
        self._gone(worker, "was removed by the operator")

    def shutdown(self) -> None:
        """End: after the outer step that is under way, and with everything saved."""
        self.stopped.set()
        self.wake()

    def set(self, **values: float) -> dict[str, Any]:
        """Change `outer_lr`, `outer_momentum`, `round_timeout_s`, `min_workers` or `num_workers`, from the next round.

        ConfigError for anything else; nothing is changed then.
        """
        known = ("outer_lr", "outer_momentum", "round_timeout_s", "min_workers", "num_workers")
        if not values or any(name not in known for name in values):
            unknown = ", ".join(sorted(set(values) - set(known))) or "nothing"
            raise ConfigError(f"cannot set {unknown}", fix=f"one or more of {', '.join(known)}")
        outer = {name.removeprefix("outer_"): value for name, value in values.items() if name.startswith("outer_")}
        for name, value in outer.items():
            if not hasattr(self.outer, name):
                raise ConfigError(f"{self.outer.describe()} has no {name}", fix="restart the server with another")
            _require_rate(name, value)
        self.rounds.change(**{name: value for name, value in values.items() if not name.startswith("outer_")})  # type: ignore[arg-type]
        self._later |= outer
        if not self._lock.locked():
            self._apply_later()
        self.wake()
        return dict(values)

    def command(self, worker: str | None, command: str) -> list[str]:
        """Relay `save`, `stop` or `abort` with the next heartbeat of a worker, or of all; returns whom it reaches."""
        if command not in ("save", "stop", "abort"):
            raise ProtocolError(f"there is no command {command!r}", fix="save, stop or abort")
        return self.members.command(worker, cast(Command, command))

    def _apply_later(self) -> None:
        for name, value in self._later.items():
            setattr(self.outer, name, value)
        self._later.clear()

    async def unit(self, request: Any, key: str) -> dict[str, int]:
        """The rows that a worker asks for."""
        if self.ledger is None:
            raise ProtocolError(
                "this server leases no work units", status=404, fix="start it with --work-units 1024, say"
            )
        self.members.require(str(request.get("worker") if isinstance(request, dict) else None), key)
        return await self.ledger.answer(request)

    def status(self) -> dict[str, Any]:
        """All that is shown of a server, as JSON."""
        now = self._clock()
        num_parameters = sum(fragment.numel for fragment in self.fragments)
        state = "draining" if self.draining else "waiting" if self.rounds.is_waiting else "training"
        return {
            "mode": self.settings.mode,
            "state": state,
            "versions": [fragment.version.number for fragment in self.fragments],
            "durable": [fragment.durable for fragment in self.fragments],
            "num_workers": self.rounds.num_workers,
            "min_workers": self.rounds.min_workers,
            "round_timeout_s": self.rounds.round_timeout_s,
            "sync_every": self.settings.sync_every,
            "workers": {
                member.name: {
                    "host": member.host,
                    "mesh": member.mesh,
                    "state": "left" if member.state == "kicked" else member.state,
                    "last_heartbeat_s": round(now - member.renewed_at, 3),
                    "steps": member.steps,
                    "steps_per_s": member.steps_per_s,
                    "tokens_per_s": member.tokens_per_s,
                    "loss": member.loss,
                    "counted": member.num_counted,
                    "bytes_up": member.bytes_up,
                    "bytes_down": member.bytes_down,
                    "sync_every": self.sync_every(member),
                }
                for member in self.members
            },
            "held": [
                {
                    "fragment": number,
                    "round": there.version.number,
                    "workers": sorted(worker for worker, _ in there.complete),
                    "expected": sorted(self.rounds.expected(number)),
                    "open_s": round(now - there.opened_at, 3),
                }
                for number, there in enumerate(self.rounds.rounds)
            ],
            "outer": self.outer.describe(),
            "model": {"parameters": num_parameters, "bytes": 4 * num_parameters},
            "uptime_s": round(now - self._started_at, 3),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "refused": self.num_refused,
            "trouble": self.trouble or self.intake.trouble,
            "spool": {"memory_bytes": self.spool.memory_used, "disk_bytes": self.spool.disk_used},
            "history": list(self.history),
            "ledger": None if self.ledger is None else self.ledger.status,
        }


def _fragment(values: Mapping[str, Tensor], names: Sequence[str], download: str) -> FragmentValues:
    mine = {name: values[name].detach().to("cpu", torch.float32) for name in names}
    digest = xxhash.xxh3_64()
    for tensor in mine.values():
        digest.update(raw_bytes(tensor.contiguous()))
    return FragmentValues(mine, Version(0, digest.hexdigest()), download)


def _spool_budget(fragments: Sequence[FragmentValues]) -> int:
    """What is left of four models beside master and published values, momentum, change, and room for one parameter."""
    model = sum(4 * fragment.numel for fragment in fragments)
    change = sum(fragment.change.data.nbytes for fragment in fragments if fragment.change is not None)
    largest = max(tensor.nbytes for fragment in fragments for tensor in fragment.master.values())
    return max(64 << 20, model - change - largest)


def _require_parameters(values: Mapping[str, Tensor], settings: Settings) -> None:
    named = [name for names in settings.fragments for name in names]
    missing = sorted(set(settings.parameters) - set(values)) + sorted(set(settings.parameters) - set(named))
    extra = sorted(set(values) - set(settings.parameters)) + sorted(set(named) - set(settings.parameters))
    if missing or extra or len(named) != len(set(named)):
        raise ConfigError(
            "values, settings and fragments are not of the same parameters: "
            f"missing {', '.join(missing[:5]) or 'none'}; not wanted {', '.join(extra[:5]) or 'none'}",
            fix="make the settings from the model that is given",
        )


def _require_rate(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ConfigError(
            f"outer_{name} is {value!r}", fix=f"outer_{name}: 0.7, or another number that is not negative"
        )
