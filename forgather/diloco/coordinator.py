"""The server of a run, without its network: who is there, what has come, when a round closes, what is on the disk.

Everything that decides runs on one event loop. What takes time runs in threads: contributions are looked through in
some, outer steps and saving in one, one after the other. So heartbeats and status are answered whatever the disk does.

    register, beat, leave                       who is there (`members`)
    intake                                      contributions, until their round closes
    publisher                                   outer steps, versions, what is on the disk
    answer                                      values, waited for
    controls                                    what an operator may do
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from forgather.checkpoint.keep import Keep
from forgather.checkpoint.run_folder import RunFolder
from forgather.diloco.combine import Guard
from forgather.diloco.controls import Controls
from forgather.diloco.downloads import ChangedError
from forgather.diloco.first_values import fragments_of, spool_budget
from forgather.diloco.fragment_values import Answer
from forgather.diloco.frame import ProtocolError
from forgather.diloco.intake import Intake
from forgather.diloco.ledger import Ledger
from forgather.diloco.members import Member, Members
from forgather.diloco.messages import Contribution, WantValues
from forgather.diloco.outer import Outer, staleness_weight
from forgather.diloco.presence import Beat, Heartbeat, Register, Registered
from forgather.diloco.publisher import Publisher, StoppingError
from forgather.diloco.rounds import Rounds
from forgather.diloco.server_status import server_status
from forgather.diloco.settings import Settings
from forgather.diloco.spool import Spool
from forgather.errors import CheckpointError

STEP_WAIT_S = 60.0  # for an outer step, or a part of it, of which those before had a quarter of that
_TICK_S = 0.25
# What must agree, and what makes it so.
_SAME = {
    "package": "train the server's model: the same -p, -t and key.path=value as it was started with; or fetch it, with "
    "`forgather diloco package`",
    "tokenizer": "take the server's model and tokenizer: `forgather diloco package` fetches both",
    "data": "prepare the same dataset on all machines: the same sources, tokenizer and block length",
}
_MUST_AGREE = tuple(_SAME)


class Coordinator:
    """Coordinates the training of one model, whose state is in the run folder `run`.

    `values` are the parameters of `settings` to begin with, made fp32 where they are not; with a checkpoint in the
    folder its values are taken instead. `constants` are what else the model has (buffers), saved with it as they are;
    every checkpoint carries the model's `package`. Contributions take `spool_bytes` of memory, and files beyond that;
    None: what is left of four models beside what the server has anyway. ConfigError and CheckpointError for arguments
    that mean nothing, or are not those of the state in the folder.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        settings: Settings,
        outer: Outer,
        run: RunFolder,
        *,
        num_workers: int,
        min_workers: int = 1,
        round_timeout_s: float | None = None,
        save_every: int = 1,
        keep: Keep | None = None,
        guard: Guard | None = None,
        constants: Mapping[str, Tensor] | None = None,
        package: Path | None = None,
        spool_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        staleness: Callable[[int], float] = staleness_weight,
    ) -> None:
        self.fragments = fragments_of(values, settings)
        outer.require_parameters(settings.parameters)
        self.settings = settings if settings.training else replace(settings, training=secrets.token_hex(8))
        self.outer = outer
        self.run = run
        self.name = secrets.token_hex(8)  # of this process: what it only holds goes with it
        self.draining = False
        self.stopped = asyncio.Event()
        self.started_at = clock()
        self.num_refused = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.ledger = Ledger(settings.work_units) if settings.work_units else None
        self.members = Members(settings.lease_s, clock)
        self.rounds = Rounds(
            [fragment.version for fragment in self.fragments],
            self.members,
            clock,
            num_workers=num_workers,
            min_workers=min_workers,
            round_timeout_s=round_timeout_s,
            mode=settings.mode,
            say=run.say,
        )
        self._clock = clock
        self._changed = asyncio.Condition()
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._threads = ThreadPoolExecutor(3, thread_name_prefix="check")
        folder = run.dir / "spool"
        folder.mkdir(exist_ok=True)
        budget = spool_budget(self.fragments, outer.num_states) if spool_bytes is None else spool_bytes
        self.spool = Spool(folder, budget, self._threads.submit)
        self.intake = Intake(settings, self.fragments, self.rounds, self.spool, self._threads, self.until)
        if package is not None:
            run.describe("package", package)
        self.publisher = Publisher(
            run,
            self.fragments,
            self.rounds,
            self.intake,
            outer,
            guard or Guard(),
            staleness,
            self.ledger,
            clock,
            save_every=save_every,
            keep=keep,
            constants=constants or {},
            document=self._document,
            require_document=self._require_document,
            accept_document=self._accept_document,
            tell=self.tell,
            until=self.until,
            stopped=self.stopped,
        )
        self.controls = Controls(self)
        self.publisher.load()

    # --- who is there

    def register(self, request: Register) -> Registered:
        """Take a worker in. ProtocolError where its data or model are others', or its name is a live worker's."""
        if self.draining and not self.members.is_expected_back(request):
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
        if self.draining:
            self.members.tell(member, "drain")  # it was away when the others were told
        if self.ledger is not None:
            self.ledger.begin(request.worker, member.key_digest)
        if outcome != "again":
            self.run.say(f"worker {member.name} of {member.host or 'an unnamed host'} is here ({outcome})")
        self.wake()
        versions = [fragment.version for fragment in self.fragments]
        return Registered(self.settings, versions, self.name, self.publisher.rates.in_force)

    def beat(self, worker: str, key: str, heartbeat: Heartbeat) -> Beat:
        """A worker lives."""
        return self.members.beat(worker, key, heartbeat, self.sync_every)

    def leave(self, worker: str, key: str) -> None:
        """A worker has done what it wanted to do; what is complete of it counts."""
        if self.members.leave(worker, key):
            self.rounds.left(worker)
            self.gone(worker, "has left")

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

    def gone(self, worker: str, how: str) -> None:
        """Nobody is to wait for this worker."""
        self.run.say(f"worker {worker} {how}")
        if self.ledger is not None:
            self.ledger.release(worker, self.intake.rows_of(worker))
        self.wake()

    def _require_same(self, request: Register) -> None:
        """What must agree agrees; who is the first to say something says it for all."""
        said = {name: getattr(request, name) for name in _MUST_AGREE if getattr(request, name) is not None}
        for name, theirs in said.items():
            ours = getattr(self.settings, name)
            if ours not in (None, theirs):
                refused = ProtocolError(
                    f"the {name} of {request.worker} is {theirs}, and the server's is {ours}",
                    status=422,
                    fix=_SAME[name],
                )
                self.run.say(f"refused: {refused.message}")
                raise refused
        self.settings = replace(self.settings, **said)

    # --- contributions and values

    async def check(self, header: Contribution) -> None:
        """ProtocolError unless what a contribution says of work units can be counted."""
        if self.ledger is not None:
            await self.ledger.check(header.consumed)

    async def answer(self, fragment: int, want: WantValues, worker: str | None = None) -> Answer | None:
        """What to send to `worker` for `want`, once there is such a version; None when there was none for `wait_s`."""
        self.rounds.require_fragment(fragment)
        there = self.fragments[fragment]
        there.require(want)
        if want.counted is not None and worker is None:
            raise ProtocolError("whose contribution is it to have?", status=404, fix="register again")

        def is_there() -> bool:
            if not there.can_answer(want):
                return False
            return want.counted is None or self.rounds.counted[fragment].has(str(worker), want.counted)

        return there.answer(want) if await self.until(is_there, want.wait_s) else None

    async def change_goes_on(self, answer: Answer) -> None:
        """Return when more of a change was made. TimeoutError when that is too late, or the server ends."""
        if not await self.until(answer.has_more, STEP_WAIT_S):
            raise TimeoutError

    async def digests(self, answer: Answer) -> list[bytes]:
        """Those of the values that an answer leads to, once they are there. ChangedError when others are by then.

        However long that takes: whoever sends the answer knows how long somebody waits for them.
        """
        there = answer.values
        await self.until(lambda: not (answer.is_current and there.coming == answer.version), None)
        if answer.is_current and there.version == answer.version:
            known = there.digests
            # Not in the threads that check: they end before the answers that are under way.
            digests = await asyncio.to_thread(lambda: [there.digest(each, known) for each in answer.slices])
            if answer.is_current:
                return digests
        raise ChangedError

    async def until(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        """Wait until something that is told of makes `condition` true, or the server ends, or for so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: condition() or self.stopped.is_set())
        return condition()

    async def unit(self, request: Any, key: str) -> dict[str, list[list[int]]]:
        """The rows that a worker asks for."""
        if self.ledger is None:
            raise ProtocolError(
                "this server leases no work units",
                status=422,
                fix="start it with --work-units 1024, say, or the worker with --no-diloco-leased",
            )
        worker = request.get("worker") if isinstance(request, dict) else None
        self.members.require(str(worker), key)
        return await self.ledger.answer(request)

    # --- rounds

    async def __aenter__(self) -> Self:
        if self.ledger is not None:
            self.ledger.open(self.run.dir / "leases.jsonl")
            for member in self.members:
                if not member.is_live:  # what it had brought, and was not counted, went with the process before
                    self.ledger.release(member.name)
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._close_rounds())]
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Let the outer step that is under way end, save what is not saved, and give back what was taken."""
        self.shutdown()
        await self.tell()
        try:
            try:
                await asyncio.gather(*self._tasks)
            finally:
                await self.publisher.close()
        finally:
            self._threads.shutdown()
            self.intake.close()
            if self.ledger is not None:
                self.ledger.close()

    def wake(self) -> None:
        """Look whether a round is to be closed."""
        self._woken.set()

    async def tell(self) -> None:
        """Something has happened: whoever waits is to look whether it was that."""
        async with self._changed:
            self._changed.notify_all()

    async def _watch(self) -> None:
        """Notice who is dead, deadlines, and when all have left."""
        has_leases_of_unknown = self.ledger is not None
        while not self.stopped.is_set():
            if has_leases_of_unknown and not self.members.expects_unknown:
                assert self.ledger is not None, "leases are its"
                self.ledger.release_all_but({member.name for member in self.members})
                has_leases_of_unknown = False
            for worker in self.members.expire():
                self.gone(worker, "is dead: no heartbeat")  # it is still expected, should it be back in time
            deadline = self.rounds.next_deadline()
            if self.rounds.is_made_again or (deadline is not None and self._clock() >= deadline):
                self.wake()
            if self.draining and not self.members.live() and not self.rounds.has_work:
                if num_left := sum(len(each.complete) for each in self.rounds.rounds):
                    self.run.say(f"warning: {num_left} contributions do not count: too few for a round (min_workers)")
                self.shutdown()
                await self.tell()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), _TICK_S)

    async def _close_rounds(self) -> None:
        while not self.stopped.is_set():
            await self._woken.wait()
            self._woken.clear()
            for fragment in range(len(self.fragments)):
                is_closed = True
                while is_closed and not self.stopped.is_set():
                    try:
                        is_closed = await self.publisher.close_round(fragment)
                    except StoppingError:
                        return
                    except Exception as error:
                        # The master values may be half of a new version: only what is on the disk is good.
                        self.publisher.has_failed(f"an outer step failed: {error}")
                        self.shutdown()
                        raise
                    finally:
                        await self.tell()

    def _document(self) -> dict[str, Any]:
        """The state that is no tensor."""
        return {
            "fragments": [list(names) for names in self.settings.fragments],
            "download": self.settings.download,
            "mode": self.settings.mode,
            "training": self.settings.training,
            "members": self.members.state_dict(),
            "rounds": self.rounds.state_dict(),
            "outer": self.publisher.rates.state_dict(),
            "history": list(self.publisher.history),
            "said": {name: getattr(self.settings, name) for name in _MUST_AGREE},
        }

    def _require_document(self, document: Mapping[str, Any]) -> None:
        for name in ("fragments", "download", "mode"):
            ours = getattr(self.settings, name)
            ours = [list(names) for names in ours] if name == "fragments" else ours
            if document[name] != ours:
                theirs = f"{len(document[name])} other" if name == "fragments" else document[name]
                raise CheckpointError(
                    f"the state in {self.run.dir} is of a server with {theirs} {name}",
                    fix="start it with the settings and the model that it had, or give another folder: -o DIR",
                )

    def _accept_document(self, document: Mapping[str, Any]) -> None:
        self.members.load_state_dict(document["members"])
        self.rounds.load_state_dict(document["rounds"])
        for words in self.publisher.rates.load_state_dict(document["outer"]):
            self.run.say(words)
        self.publisher.history.extend(document["history"])
        for fragment, there in zip(self.fragments, self.rounds.rounds, strict=True):
            fragment.version = there.version
        said = {name: value for name, value in document["said"].items() if getattr(self.settings, name) is None}
        self.settings = replace(self.settings, training=document["training"], **said)

    # --- its end, and what is seen of it

    def shutdown(self) -> None:
        """End: after the outer step that is under way, and with everything saved."""
        self.stopped.set()
        self.wake()

    @property
    def trouble(self) -> str | None:
        """Why it cannot save, or take contributions, at the moment."""
        return self.publisher.trouble or self.intake.trouble

    def status(self) -> dict[str, Any]:
        """All that is shown of a server, as JSON."""
        return server_status(self, self._clock())
