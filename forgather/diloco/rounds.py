"""When a round closes, and what a contribution to it is answered: pure logic, without time, network or tensors.

Each fragment has one open round, of the number of its version. `Rounds` knows who is expected in it and whose
contribution is complete; `due` says who closes it; `published` opens the next. In the asynchronous mode each complete
contribution closes a round alone, in the order in which they became complete.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from forgather.diloco.counted import Counted
from forgather.diloco.frame import ProtocolError
from forgather.diloco.members import Members
from forgather.diloco.messages import Closed, Version
from forgather.diloco.settings import Mode
from forgather.errors import ConfigError

Member: TypeAlias = tuple[str, int]  # a worker, and the round that its contribution names
Verdict: TypeAlias = Literal["take", "held", "counted", "wait"]
_MOST_SECONDS = 1e9


@dataclass
class Round:
    """The open round of a fragment."""

    version: Version
    expected: set[str] = field(default_factory=set)  # who was there when the version was made, dead ones included
    complete: list[Member] = field(default_factory=list)  # in the order in which they became so
    first_complete_at: float | None = None
    opened_at: float = 0.0
    closing: Sequence[Member] = ()  # whose contributions the outer step that is being made has
    replay: deque[Sequence[Member]] = field(default_factory=deque)  # who closed this round, and those after it, before


class Rounds:
    """The rounds of all fragments. ConfigError for numbers of workers below 1."""

    def __init__(
        self,
        versions: Sequence[Version],
        members: Members,
        clock: Callable[[], float],
        *,
        num_workers: int,
        min_workers: int = 1,
        round_timeout_s: float | None = None,
        mode: Mode = "sync",
        say: Callable[[str], None] = print,
    ) -> None:
        self.members = members
        self.mode = mode
        self._say = say
        self._clock = clock
        self.min_workers = 1
        self.round_timeout_s: float | None = None
        self._awaited = 1  # no round closes before so many have come; 0 once one was closed
        self._have_come = False  # so many have lived at once
        self._removed: set[str] = set()  # by the operator, before so many had come: they are not waited for
        self._takes_nobody = False
        self.num_wanted = 1
        self.rounds = [Round(version, opened_at=clock()) for version in versions]
        self.change(num_workers=num_workers, min_workers=min_workers, round_timeout_s=round_timeout_s)
        self.counted = [Counted() for _ in versions]

    def change(
        self,
        num_workers: int | None = None,
        min_workers: int | None = None,
        round_timeout_s: float | None = None,
    ) -> None:
        """Change numbers while it runs; `round_timeout_s` 0 is none. ConfigError for what has no meaning."""
        wanted = self.num_wanted if num_workers is None else num_workers
        least = self.min_workers if min_workers is None else min_workers
        for name, number in (("num_workers", wanted), ("min_workers", least)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigError(f"{name} is {number!r}", fix=f"a whole number from 1: --{name.replace('_', '-')} 2")
        if wanted < least:
            raise ConfigError(
                f"num_workers {wanted} is below min_workers {least}", fix=f"num_workers {least}, or a lower min_workers"
            )
        if round_timeout_s is not None and not (
            isinstance(round_timeout_s, int | float) and 0 <= round_timeout_s <= _MOST_SECONDS
        ):
            raise ConfigError(f"round_timeout_s is {round_timeout_s!r}", fix="seconds, or 0 to wait for everybody")
        if round_timeout_s is not None:
            self.round_timeout_s = round_timeout_s or None
        if num_workers is not None:
            self.num_wanted, self._awaited = wanted, 0 if self._takes_nobody else wanted
            self._removed.clear()
            self._have_come = False
            self._have_come = self.num_awaited == 0
        self.min_workers = least

    def nobody_else_comes(self) -> None:
        """Close rounds with those who are there, however many were awaited."""
        self._awaited, self._takes_nobody = 0, True

    @property
    def is_made_again(self) -> bool:
        """Whether rounds are waited for that were closed before this server came back."""
        return any(there.replay for there in self.rounds)

    @property
    def has_work(self) -> bool:
        """Whether a round is being closed, or can be with what is there."""
        return any(there.closing or self.due(fragment) for fragment, there in enumerate(self.rounds))

    @property
    def num_workers(self) -> int:
        """How many workers a round is made of now: those that must come first, then those that live."""
        live = len(self.members.live())
        return max(live + self.num_awaited, self.min_workers)

    @property
    def num_awaited(self) -> int:
        """How many workers are still to come before a round can close, where so many were asked for.

        They have come when so many live at once; who has brought something need not live any more. One that has left
        before that, as it was refused its data for example, has not come.
        """
        if self._have_come:
            return 0
        brought = {worker for each in self.rounds for worker, _ in each.complete if worker in self.members}
        return max(0, self._awaited - len(self._removed) - len(brought | self._present()))

    @property
    def is_waiting(self) -> bool:
        """Whether there are too few workers for a round to close."""
        return self.num_awaited > 0 or len(self.members.live()) < self.min_workers

    def came(self, worker: str) -> None:
        """A worker has registered. Before anything was made, all who come are expected; then from the next round on."""
        if self._awaited or not any(each.version.number for each in self.rounds):
            for each in self.rounds:
                each.expected.add(worker)
        self._removed.discard(worker)
        self._have_come = self.num_awaited == 0

    def left(self, worker: str) -> None:
        """A worker is not expected any more, should it come back or not; what is complete of it counts."""
        for each in self.rounds:
            each.expected.discard(worker)
        if not any(name == worker for each in self.rounds for name, _ in each.complete):
            self._have_come = False  # as far as it was one of them; those who are there are counted again

    def removed(self, worker: str) -> None:
        """An operator wants it to be done without this worker: also a first round waits for one less."""
        for each in self.rounds:
            each.expected.discard(worker)
        if not self._have_come:
            self._removed.add(worker)

    def expected(self, fragment: int) -> set[str]:
        """Whose contributions the round waits for."""
        there = self.rounds[fragment]
        names = {worker for worker, _ in there.replay[0]} if there.replay else there.expected
        return {name for name in names if self.members.is_live(name)}

    def verdict(self, worker: str, round: int, fragment: int, base: Version) -> Verdict | Closed:
        """What becomes of a contribution, which began with `base`, that is about to be sent.

        `take` it; it is `held` already in the round that is being closed, or was `counted`; `wait` until that round is
        closed, and ask again; or it is to be sent for another round.
        """
        there = self.rounds[fragment]
        if self.counted[fragment].has(worker, round):
            return "counted"
        if (worker, round) in there.closing:
            return "held"
        if round < there.version.number and self.counted[fragment].has_begun_with(worker, base.number):
            self.counted[fragment].know_as(worker, round)  # by which the worker asks for values that have it
            return "counted"
        if there.replay:
            return self._verdict_in_replay(fragment, worker, round)
        if self.mode == "async" and round <= there.version.number:
            return "take"
        if there.closing:
            return "wait"
        return "take" if round == there.version.number else Closed(there.version)

    def _verdict_in_replay(self, fragment: int, worker: str, round: int) -> Verdict | Closed:
        there = self.rounds[fragment]
        if (worker, round) in there.replay[0]:
            return "take"
        due = next((named for name, named in there.replay[0] if name == worker), None)
        is_missing = due is not None and (worker, due) not in there.complete and not there.closing
        if is_missing and round == there.version.number:
            # It was told so, and brings what it has now: a worker that has kept what is wanted brings that first.
            self._give_up_replay(fragment, f"{worker} does not have any more what it brought for that")
            return "take"
        if is_missing:
            return Closed(there.version)  # what it sent for this round before is wanted first
        return "wait"

    def _give_up_replay(self, fragment: int, cause: str) -> None:
        there = self.rounds[fragment]
        there.replay.clear()
        self._say(f"fragment {fragment}: version {there.version.number + 1} is not made again as it was: {cause}")

    def completed(self, worker: str, round: int, fragment: int) -> None:
        """All parts of a contribution are there, and it is sound."""
        there = self.rounds[fragment]
        if (worker, round) not in there.complete:
            there.complete.append((worker, round))
        if there.first_complete_at is None:
            there.first_complete_at = self._clock()

    def withdrawn(self, worker: str, round: int, fragment: int) -> None:
        """A contribution is not complete any more."""
        there = self.rounds[fragment]
        if (worker, round) in there.complete:
            there.complete.remove((worker, round))
        if not there.complete:
            there.first_complete_at = None

    def due(self, fragment: int) -> list[Member]:
        """The contributions that the round closes with now, in the order of the workers' names; empty: not yet."""
        there = self.rounds[fragment]
        if there.closing:
            return []
        if there.replay:
            wanted = there.replay[0]
            if all(each in there.complete for each in wanted):
                return sorted(wanted)
            missing = [worker for worker, round in wanted if (worker, round) not in there.complete]
            gone = [worker for worker in missing if not self.members.may_come(worker)]
            if not gone:
                return []
            # What they sent before will not come again. Whether others have brought anything yet or not, they are not
            # to wait for that.
            self._give_up_replay(fragment, f"{', '.join(gone)} {'has' if len(gone) == 1 else 'have'} not come back")
        if not there.complete:
            return []
        if self.num_awaited:
            return []
        if self.mode == "async":
            return there.complete[:1]
        if len(there.complete) < self.min_workers:
            return []
        names = {worker for worker, _ in there.complete}
        if self.expected(fragment) <= names or self._is_late(there):
            return sorted(there.complete)
        return []

    def next_deadline(self) -> float | None:
        """When the next round closes at the latest, on the clock; None where nothing is certain."""
        if self.round_timeout_s is None:
            return None
        begun = [each.first_complete_at for each in self.rounds if each.first_complete_at is not None]
        return min(begun) + self.round_timeout_s if begun else None

    def close(self, fragment: int, contributors: Sequence[Member]) -> None:
        """The outer step begins; until it is published the round takes nothing."""
        self._awaited = 0
        self._removed.clear()
        self.rounds[fragment].closing = list(contributors)

    def published(self, fragment: int, version: Version, bases: Sequence[Version]) -> list[Member]:
        """The closing round has made `version`: the next is open. Returns complete contributions that were left out.

        `bases` are the versions that the contributions began with, in the order in which `close` was given these.
        """
        there = self.rounds[fragment]
        for (worker, round), base in zip(there.closing, bases, strict=True):
            self.counted[fragment].add(worker, round, base.number, there.version.number)
            if worker in self.members:
                self.members[worker].num_counted += 1
        over = [each for each in there.complete if each not in there.closing]
        self.rounds[fragment] = Round(version, self._present(), opened_at=self._clock(), replay=there.replay)
        if there.replay:
            there.replay.popleft()
        if self.mode == "async":
            for each in over:
                self.completed(*each, fragment)
            return []
        return over

    def renamed(self, worker: str, retired: str) -> None:
        """Another worker has the name now, and was never counted; what the old one has brought is `retired`'s."""
        self.left(worker)
        for there, counted in zip(self.rounds, self.counted, strict=True):
            counted.forget(worker)
            there.complete = [(retired if name == worker else name, round) for name, round in there.complete]
            there.closing = [(retired if name == worker else name, round) for name, round in there.closing]

    def replay(self, fragment: int, closed: Iterable[Sequence[Member]]) -> None:
        """The next rounds are to be closed with just these contributions, as long as they can come."""
        self.rounds[fragment].replay = deque(closed)

    def state_dict(self) -> dict[str, Any]:
        """The state that a new server takes up."""
        return {
            "versions": [each.version.to_json() for each in self.rounds],
            "expected": [sorted(each.expected) for each in self.rounds],
            "counted": [each.state_dict() for each in self.counted],
            "awaited": self._awaited,
            "num_wanted": self.num_wanted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where a server stopped."""
        for fragment, version in enumerate(state["versions"]):
            self.rounds[fragment] = Round(
                Version.from_json(version), set(state["expected"][fragment]), opened_at=self._clock()
            )
            self.counted[fragment].load_state_dict(state["counted"][fragment])
        if state["num_wanted"] == self.num_wanted:
            self._awaited = state["awaited"]

    def require_fragment(self, fragment: int) -> None:
        """ProtocolError (422) unless there is a fragment of this number."""
        if not 0 <= fragment < len(self.rounds):
            raise ProtocolError(
                f"there is no fragment {fragment}: there are {len(self.rounds)}, from 0",
                status=422,
                fix="register again: the settings say what the fragments are",
            )

    def _present(self) -> set[str]:
        return {member.name for member in self.members.live()}

    def _is_late(self, there: Round) -> bool:
        timeout = self.round_timeout_s
        return (
            timeout is not None
            and there.first_complete_at is not None
            and self._clock() - there.first_complete_at >= timeout
        )
