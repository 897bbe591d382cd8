"""Takes in contributions, part by part, and holds them until their round closes.

A part is worth something when it has come whole: a torn body leaves nothing. What a round does not take is answered
before room is taken for it.
"""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace

import xxhash

from forgather.diloco.contribution import Examination, Held, Part, Plan, plan_payload, require_whole
from forgather.diloco.fragment_values import FragmentValues
from forgather.diloco.frame import ProtocolError
from forgather.diloco.members import Member
from forgather.diloco.messages import Accepted, Closed, Contribution, Identity
from forgather.diloco.payload import DIGEST_BYTES
from forgather.diloco.rounds import Rounds, Verdict
from forgather.diloco.settings import Settings
from forgather.diloco.spool import Spool, refusal

WAIT_S = 20.0  # for a round that is just being closed


class Intake:
    """The contributions to open rounds. `until(condition, seconds)` waits for what happens on the server."""

    def __init__(
        self,
        settings: Settings,
        fragments: Sequence[FragmentValues],
        rounds: Rounds,
        spool: Spool,
        checkers: Executor,
        until: Callable[[Callable[[], bool], float], Awaitable[bool]],
    ) -> None:
        self.settings = settings
        self.fragments = fragments
        self.rounds = rounds
        self.spool = spool
        self.trouble: str | None = None
        self._checkers = checkers
        self._until = until
        self._held: dict[tuple[int, str, int], Held] = {}
        self._incoming: dict[Identity, object] = {}

    def held(self, fragment: int, worker: str, round: int) -> Held:
        """A contribution whose parts are all there."""
        return self._held[fragment, worker, round]

    def close(self) -> None:
        """Give back all room."""
        for held in self._held.values():
            held.release()
        self._held.clear()

    def plan(self, identity: Identity, header: Contribution) -> Plan:
        """What a payload must be like; ProtocolError unless it can be part of a contribution."""
        self.rounds.require_fragment(identity.fragment)
        shapes = self.fragments[identity.fragment].shapes
        if self.settings.mode == "async" and header.content == "values":
            raise ProtocolError(
                "values say nothing to an asynchronous server", status=422, fix="send differences: they apply to any"
            )
        return plan_payload(identity, header, shapes, upload=self.settings.upload)

    async def verdict(self, identity: Identity, header: Contribution) -> Accepted | Closed | None:
        """The answer to a contribution that is not to be taken; None for one that is."""
        answer = self._look(identity, header)
        if answer == "wait":
            await self._until(lambda: self._look(identity, header) != "wait", WAIT_S)
            answer = self._look(identity, header)
        match answer:
            case Closed():
                return answer
            case "held":
                return Accepted("held")
            case "counted":
                return Accepted("counted")
            case "wait":
                raise ProtocolError(
                    f"round {identity.round} of fragment {identity.fragment} is being closed, or made again after a "
                    "restart",
                    status=503,
                    fix="send it again in a while",
                )
        version = self.fragments[identity.fragment].version
        if header.content == "values" and header.base != version:
            return Closed(version)  # what they began with is not here any more
        return None

    def _look(self, identity: Identity, header: Contribution) -> Verdict | Closed:
        return self.rounds.verdict(identity.worker, identity.round, identity.fragment, header.base)

    async def receive(
        self, member: Member, identity: Identity, header: Contribution, plan: Plan, blocks: AsyncIterable[bytes]
    ) -> Accepted | Closed:
        """Take the payload of a part for which there was no other answer."""
        room = self.spool.room(plan.num_bytes)
        mine = self._incoming[identity] = object()
        is_kept = False
        part = Part(header, plan, room)
        examination = Examination(part, self.fragments[identity.fragment].published)
        try:
            await self._written(room.take())
            self.trouble = None
            digest = await self._fill(part, examination, blocks, lambda: self._incoming.get(identity) is mine)
            answer = await self.verdict(identity, header)
            if answer is not None:
                return answer
            if self.rounds.members.get(identity.worker) is not member or member.state in ("left", "kicked"):
                raise ProtocolError(f"{identity.worker} is no member any more", status=404, fix="register again")
            is_kept = True
            return self._keep(identity, replace(part, digest=digest, squared_norm=examination.squared_norm))
        finally:
            if self._incoming.get(identity) is mine:
                del self._incoming[identity]
            if not is_kept:
                room.release()

    async def _fill(
        self, part: Part, examination: Examination, blocks: AsyncIterable[bytes], is_wanted: Callable[[], bool]
    ) -> str:
        """Receive a part, and look through it meanwhile; returns its digest."""
        room, expected = part.room, part.plan.num_bytes
        digest = xxhash.xxh3_64()
        received, last = 0, bytearray()  # the digest is behind the payload
        looking: asyncio.Future[None] | None = None
        try:
            async for block in blocks:
                data = memoryview(block)[: expected - received]
                received += len(data)
                last += block[len(data) :]
                if len(last) > DIGEST_BYTES:
                    raise ProtocolError(f"more than the {expected:,} bytes that the header tells of", status=422)
                if not is_wanted():
                    raise ProtocolError("this part is being sent again by another connection", status=409)
                digest.update(data)
                await self._written(room.write(data))
                if looking is not None and looking.done():
                    looking = looking.result()
                if looking is None and examination.has_work:
                    looking = self._look_through(examination)
            await self._written(room.finish())
            if received != expected or len(last) != DIGEST_BYTES:
                raise ProtocolError(f"{received:,} bytes of {expected:,} have come", fix="send it again")
            if digest.digest() != last:
                raise ProtocolError("the payload does not have the digest that is sent behind it", fix="send it again")
        finally:
            if looking is not None:
                await asyncio.wait([looking])
        if looking is not None:
            looking.result()
        await self._look_through(examination)
        return last.hex()

    def _look_through(self, examination: Examination) -> "asyncio.Future[None]":
        return asyncio.get_running_loop().run_in_executor(self._checkers, examination.go_on)

    async def _written(self, writing: "Future[None] | None") -> None:
        if writing is None:
            return
        try:
            await asyncio.wrap_future(writing)
        except OSError as error:
            refused = refusal(self.spool.folder, error)
            self.trouble = refused.message
            raise refused from error

    def _keep(self, identity: Identity, part: Part) -> Accepted:
        key = (identity.fragment, identity.worker, identity.round)
        held = self._held.get(key)
        if held is None or not held.goes_with(part.header):
            if held is not None:
                self.drop(*key)
            self._forget_older(identity)
            held = self._held[key] = Held(identity.worker, identity.round, identity.fragment, part.header)
        held.put(identity.part, part)
        if held.num_missing:
            return Accepted("held", held.num_missing)
        try:
            require_whole(held.parts.values(), self.fragments[identity.fragment].shapes)
        except ProtocolError:
            self.drop(*key)
            raise
        self.rounds.completed(identity.worker, identity.round, identity.fragment)
        return Accepted("held")

    def _forget_older(self, identity: Identity) -> None:
        """What a worker has not finished sending when it begins another round will not be finished."""
        for key, held in list(self._held.items()):
            is_older = held.fragment == identity.fragment and held.round < identity.round
            if held.worker == identity.worker and is_older and held.num_missing:
                self.drop(*key)

    def rows_of(self, worker: str) -> list[Mapping[str, int]]:
        """The rows in what is complete of this worker, which waits to be counted."""
        return [dict(held.consumed) for held in self._held.values() if held.worker == worker and not held.num_missing]

    def drop(self, fragment: int, worker: str, round: int) -> None:
        """Forget a contribution: it was used, or is not wanted."""
        held = self._held.pop((fragment, worker, round), None)
        if held is not None:
            self.rounds.withdrawn(worker, round, fragment)
            held.release()

    def drop_all_of(self, worker: str) -> list[Held]:
        """Forget what a worker has sent for rounds that are not being closed; returns that."""
        dropped = [
            held
            for held in self._held.values()
            if held.worker == worker and (worker, held.round) not in self.rounds.rounds[held.fragment].closing
        ]
        for held in dropped:
            self.drop(held.fragment, worker, held.round)
        return dropped

    def drop_past(self, fragment: int) -> None:
        """Forget what never became complete for rounds that are over."""
        number = self.fragments[fragment].version.number
        is_over = self.settings.mode == "sync"
        for key, held in list(self._held.items()):
            if is_over and held.fragment == fragment and held.round < number:
                self.drop(*key)

    def renamed(self, worker: str, retired: str) -> None:
        """Another worker has the name now; what the old one has sent is under `retired`."""
        for (fragment, name, round), held in list(self._held.items()):
            if name == worker and held.num_missing:
                self.drop(fragment, name, round)
            elif name == worker:
                del self._held[fragment, name, round]
                held.worker = retired
                self._held[fragment, retired, round] = held
