"""When rounds close and who counts, without network and without waiting."""

from collections.abc import Sequence

import pytest

from forgather.diloco.frame import ProtocolError
from forgather.diloco.members import Members
from forgather.diloco.messages import Closed, Version
from forgather.diloco.presence import Beat, Heartbeat, Register
from forgather.diloco.pulse import Pulse
from forgather.diloco.rounds import Rounds
from forgather.errors import ConfigError


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Server:
    """Members and rounds of one or several fragments, and what the tests do to them."""

    def __init__(
        self, num_fragments: int = 1, *, lease_s: float = 30.0, num_workers: int = 2, **others: object
    ) -> None:
        self.time = Time()
        self.members = Members(lease_s, self.time)
        versions = [version(0)] * num_fragments
        self.bases: dict[tuple[int, str, int], Version] = {}
        self.said: list[str] = []
        self.rounds = Rounds(
            versions,
            self.members,
            self.time,
            num_workers=num_workers,
            say=self.said.append,
            **others,  # type: ignore[arg-type]
        )

    def come(self, *names: str) -> None:
        for name in names:
            self.members.register(Register(name, key_of(name)))
            self.rounds.came(name)

    def verdict(self, name: str, round: int, fragment: int = 0, *, base: int | None = None) -> object:
        """Of a contribution that began with the version of its round, or with another."""
        return self.rounds.verdict(name, round, fragment, version(round if base is None else base))

    def bring(self, *names: str, round: int | None = None, fragment: int = 0, base: int | None = None) -> None:
        number = self.rounds.rounds[fragment].version.number if round is None else round
        for name in names:
            assert self.verdict(name, number, fragment, base=base) == "take"
            self.rounds.completed(name, number, fragment)
            self.bases[fragment, name, number] = version(number if base is None else base)

    def due(self, fragment: int = 0) -> list[str]:
        return [worker for worker, _ in self.rounds.due(fragment)]

    def close(self, fragment: int = 0) -> Sequence[tuple[str, int]]:
        """Close the round that is due; returns who was in it."""
        members = self.rounds.due(fragment)
        assert members, "nothing is due"
        self.rounds.close(fragment, members)
        self.publish(fragment)
        return members

    def publish(self, fragment: int = 0) -> None:
        """The round that is being closed has made its version."""
        there = self.rounds.rounds[fragment]
        bases = [self.bases[fragment, *each] for each in there.closing]
        self.rounds.published(fragment, version(there.version.number + 1), bases)

    def silent_for(self, seconds: float, *, but: Sequence[str] = ()) -> list[str]:
        """Time passes, in which only some send heartbeats; returns who is dead then."""
        self.time.now += seconds
        for name in but:
            self.members.require(name, key_of(name))
        return self.members.expire()


def version(number: int) -> Version:
    return Version(number, f"lineage-{number}")


def key_of(name: str) -> str:
    return f"key-of-{name}-0123456789"


@pytest.mark.training_case(81)
def test_the_first_round_waits_until_as_many_as_were_asked_for_have_come() -> None:
    server = Server(num_workers=2)
    server.come("a")
    server.bring("a")
    assert server.due() == []
    assert server.rounds.is_waiting
    server.come("b")
    assert server.due() == []  # it has come, and is expected
    server.bring("b")
    assert server.due() == ["a", "b"]


def test_one_that_left_before_it_brought_anything_has_not_come() -> None:
    server = Server(num_workers=2)
    server.come("a", "refused")
    assert server.rounds.num_awaited == 0
    server.bring("a")
    server.members.leave("refused", key_of("refused"))
    server.rounds.left("refused")
    assert server.due() == []
    assert server.rounds.is_waiting
    assert server.rounds.num_awaited == 1
    server.come("b")
    server.bring("b")
    assert server.close() == [("a", 0), ("b", 0)]
    server.members.leave("b", key_of("b"))
    server.rounds.left("b")
    assert server.rounds.num_awaited == 0  # from here on those who are there are enough


def test_one_that_comes_again_under_its_name_is_one_worker() -> None:
    server = Server(num_workers=2)
    server.come("a")
    server.bring("a")
    server.rounds.renamed("a", "a~1234")
    server.come("a")
    server.bring("a")
    assert server.due() == []
    assert server.rounds.num_awaited == 1


def test_the_first_round_waits_for_one_less_for_each_that_an_operator_has_removed() -> None:
    server = Server(num_workers=3)
    server.come("a", "b")
    server.bring("b")
    server.members.remove("a", "kicked")
    for _ in range(2):
        server.rounds.removed("a")
    assert server.rounds.num_awaited == 1
    server.members.leave("a", key_of("a"))
    server.come("a")  # it is back
    assert server.rounds.num_awaited == 1
    assert server.due() == []
    server.members.leave("a", key_of("a"))
    server.rounds.left("a")
    assert server.rounds.num_awaited == 2
    for name in ("a", "c"):  # neither comes, whether it was here once or not
        server.rounds.removed(name)
    assert server.due() == ["b"]


def test_an_operators_number_is_of_those_who_live_and_of_nobody_who_cannot_come() -> None:
    server = Server(num_workers=1)
    server.come("a")
    server.bring("a")
    server.close()
    server.come("b")  # expected from the next round on
    server.rounds.change(num_workers=2)
    assert server.rounds.num_awaited == 0
    server.rounds.nobody_else_comes()
    server.rounds.change(num_workers=9)
    assert server.rounds.num_awaited == 0


def test_a_deadline_does_not_let_the_first_round_pass_before_all_have_come() -> None:
    server = Server(num_workers=2, round_timeout_s=5.0)
    server.come("a")
    server.bring("a")
    server.time.now += 100
    assert server.due() == []


def test_contributors_are_in_the_order_of_their_names_whoever_came_first() -> None:
    server = Server(num_workers=3)
    server.come("c", "a", "b")
    server.bring("b", "c", "a")
    assert server.due() == ["a", "b", "c"]


@pytest.mark.training_case(74)
def test_death_lowers_the_number_of_workers_once_and_releases_who_waits() -> None:
    server = Server(num_workers=2)
    server.come("a", "b")
    server.bring("a")
    assert server.rounds.num_workers == 2
    assert server.silent_for(31, but=["a"]) == ["b"]
    assert server.members.expire() == []  # it is told once
    assert server.rounds.num_workers == 1
    assert server.due() == ["a"]


@pytest.mark.training_case(74)
def test_the_number_of_workers_follows_who_joins_and_registering_again_adds_nobody() -> None:
    server = Server(num_workers=1, min_workers=1)
    numbers = []
    for name in ("a", "b", "b", "c"):
        server.come(name)
        numbers.append(server.rounds.num_workers)
    assert numbers == [1, 2, 2, 3]
    assert len(list(server.members)) == 3


@pytest.mark.training_case(74)
def test_fewer_than_the_least_number_of_workers_do_not_close_a_round() -> None:
    server = Server(num_workers=2, min_workers=2)
    server.come("a", "b")
    server.bring("a")
    server.silent_for(31, but=["a"])
    assert server.rounds.num_workers == 2
    assert server.due() == []
    assert server.rounds.is_waiting
    server.come("b")
    server.bring("b")
    assert server.due() == ["a", "b"]


@pytest.mark.training_case(75)
def test_numbers_of_workers_below_one_are_errors_and_no_lease_means_that_nobody_dies() -> None:
    for numbers in ({"num_workers": 0}, {"num_workers": 2, "min_workers": 0}, {"num_workers": 1, "min_workers": 2}):
        with pytest.raises(ConfigError, match="workers"):
            Server(**numbers)
    server = Server(lease_s=0.0, num_workers=1)
    server.come("a")
    assert server.silent_for(1e9) == []
    assert server.rounds.expected(0) == {"a"}


@pytest.mark.training_case(77)
def test_what_was_counted_is_counted_once_however_often_it_is_sent() -> None:
    server = Server(num_workers=1)
    server.come("a")
    for _ in range(3):
        server.bring("a")
        server.close()
    assert [server.verdict("a", round) for round in range(4)] == ["counted", "counted", "counted", "take"]
    assert server.members["a"].num_counted == 3


@pytest.mark.training_case(79)
def test_what_comes_too_late_is_to_be_sent_for_the_round_that_is_open() -> None:
    server = Server(num_workers=2)
    server.come("a", "b")
    server.bring("a")
    server.silent_for(31, but=["a"])
    server.close()
    assert server.verdict("b", 0) == Closed(version(1))
    with pytest.raises(ProtocolError, match="no worker 'b'") as refused:
        server.members.require("b", key_of("b"))
    assert refused.value.status == 404
    server.come("b")  # it is back
    server.bring("a", "b")
    assert server.due() == ["a", "b"]


def test_a_round_closes_at_its_deadline_with_a_quorum_and_not_without() -> None:
    server = Server(num_workers=3, min_workers=2, round_timeout_s=5.0)
    server.come("a", "b", "c")
    server.time.now += 50  # the deadline counts from the first contribution, not from the opening
    assert server.rounds.next_deadline() is None
    server.bring("a")
    assert server.rounds.next_deadline() == server.time.now + 5
    server.time.now += 6
    assert server.due() == []
    server.bring("b")
    assert server.due() == ["a", "b"]


def test_one_that_joins_later_may_contribute_and_is_expected_from_the_next_round_on() -> None:
    server = Server(num_workers=1)
    server.come("a")
    server.bring("a")
    server.close()
    server.come("b")
    assert server.rounds.expected(0) == {"a"}
    server.bring("b")
    assert server.due() == []
    server.bring("a")
    assert server.due() == ["a", "b"]
    server.close()
    assert server.rounds.expected(0) == {"a", "b"}


def test_who_has_left_is_not_waited_for_and_what_it_brought_counts() -> None:
    server = Server(num_workers=2)
    server.come("a", "b")
    server.bring("b")
    server.members.remove("b", "left")
    server.rounds.left("b")
    server.bring("a")
    assert server.due() == ["a", "b"]


def test_one_that_dies_and_comes_back_in_time_is_expected_again() -> None:
    server = Server(num_workers=2)
    server.come("a", "b")
    server.silent_for(31, but=["a"])
    assert server.rounds.expected(0) == {"a"}
    server.come("b")
    assert server.rounds.expected(0) == {"a", "b"}


def test_a_name_belongs_to_its_key_as_long_as_the_worker_lives() -> None:
    server = Server(num_workers=1)
    server.come("a")
    with pytest.raises(ProtocolError, match="another key") as refused:
        server.members.register(Register("a", "quite-another-key"))
    assert refused.value.status == 409
    assert server.members.register(Register("a", key_of("a"))) == "again"
    server.silent_for(31)
    assert server.members.register(Register("a", "quite-another-key")) == "another"
    with pytest.raises(ProtocolError, match="not the key"):
        server.members.require("a", key_of("a"))


def test_another_worker_of_the_name_of_a_dead_one_is_not_taken_for_it() -> None:
    server = Server(num_workers=2)
    server.come("a", "b")
    server.bring("a", "b")
    server.close()
    server.bring("b")
    server.silent_for(31, but=["a"])
    assert server.members.register(Register("b", "quite-another-key")) == "another"
    server.rounds.renamed("b", "b~old")
    server.rounds.came("b")
    assert server.verdict("b", 0) == Closed(version(1))  # it was never in round 0
    server.bring("a", "b")
    assert server.due() == ["a", "b", "b~old"]  # both have worked for it


def test_fragments_have_rounds_of_their_own() -> None:
    server = Server(2, num_workers=1)
    server.come("a")
    server.bring("a", fragment=1)
    assert server.due(0) == []
    server.close(1)
    assert [each.version.number for each in server.rounds.rounds] == [0, 1]
    assert server.verdict("a", 0) == "take"
    assert server.verdict("a", 0, 1) == "counted"


def test_while_a_round_is_closed_its_own_are_held_and_others_wait() -> None:
    server = Server(num_workers=2, round_timeout_s=1.0)
    server.come("a", "b")
    server.bring("a")
    server.time.now += 2
    server.rounds.close(0, server.rounds.due(0))
    assert server.due() == []
    assert server.verdict("a", 0) == "held"
    assert server.verdict("b", 0) == "wait"
    server.publish()
    assert server.verdict("a", 0) == "counted"
    assert server.verdict("b", 0) == Closed(version(1))


@pytest.mark.training_case(69)
def test_an_asynchronous_server_takes_each_alone_in_order_and_waits_for_nobody() -> None:
    server = Server(num_workers=2, mode="async")
    server.come("w0")
    server.bring("w0")
    assert server.due() == []  # they begin together
    server.come("w1")
    assert server.close() == [("w0", 0)]
    for round in range(1, 3):
        server.bring("w0", round=round)
        assert server.close() == [("w0", round)]
    server.bring("w1", round=0)  # stale, and as good as any
    server.bring("w0", round=3)
    assert server.close() == [("w1", 0)]
    assert server.close() == [("w0", 3)]
    assert server.rounds.rounds[0].version.number == 5
    assert server.verdict("w1", 0) == "counted"


def test_a_server_that_comes_back_knows_who_was_counted_and_who_is_expected() -> None:
    server = Server(num_workers=2)
    server.come("a", "b")
    server.bring("a", "b")
    server.close()
    state = server.rounds.state_dict()
    again = Server(num_workers=2)
    again.members.load_state_dict(server.members.state_dict())
    again.rounds.load_state_dict(state)
    assert again.rounds.state_dict() == state
    assert again.verdict("a", 0) == "counted"
    assert again.rounds.expected(0) == {"a", "b"}  # their leases run anew, and they are to say that they are there
    with pytest.raises(ProtocolError):
        again.members.beat("a", key_of("a"), Heartbeat(3), lambda _: 1)
    again.come("a")
    again.members.beat("a", key_of("a"), Heartbeat(3), lambda _: 1)


class TestRoundsThatAreMadeAgain:
    """After a server came back from an older state."""

    def server(self) -> Server:
        server = Server(num_workers=2)
        server.come("a", "b", "c")
        server.rounds.replay(0, [[("a", 0), ("b", 0)], [("a", 1)]])
        return server

    def test_they_take_just_those_contributions_that_they_had(self) -> None:
        server = self.server()
        assert server.verdict("c", 0) == "wait"
        assert server.verdict("a", 1) == Closed(version(0))  # the one before is wanted first
        server.bring("a")
        assert server.verdict("a", 1) == "wait"
        assert server.due() == []
        server.bring("b")
        assert server.close() == [("a", 0), ("b", 0)]
        assert server.verdict("b", 1) == "wait"
        server.bring("a")
        assert server.close() == [("a", 1)]
        assert server.verdict("c", 2) == "take"

    def test_one_that_does_not_come_in_its_lease_ends_it_also_where_nobody_has_brought_anything(self) -> None:
        server = Server(num_workers=1)
        server.come("w", "b")
        server.rounds.replay(0, [[("w", 0)], [("w", 1)]])
        assert server.verdict("b", 0) == "wait"
        server.silent_for(31, but=["b"])
        assert server.due() == []
        assert server.verdict("b", 0) == "take"
        assert server.said == ["fragment 0: version 1 is not made again as it was: w has not come back"]
        server.bring("b")
        assert server.close() == [("b", 0)]

    def test_one_of_which_nothing_was_saved_has_as_long_to_come_as_a_lease(self) -> None:
        server = Server(num_workers=1)
        server.rounds.replay(0, [[("w", 0)]])
        server.come("b")
        server.silent_for(20, but=["b"])
        assert server.due() == []
        assert server.verdict("b", 0) == "wait"
        server.silent_for(20, but=["b"])
        assert server.due() == []
        assert server.verdict("b", 0) == "take"

    def test_a_worker_that_does_not_have_it_any_more_ends_it(self) -> None:
        server = Server(num_workers=1, mode="async")
        server.come("w", "b")
        server.rounds.rounds[0].version = version(3)
        server.rounds.replay(0, [[("w", 2)], [("b", 1)]])
        assert server.verdict("w", 9) == Closed(version(3))
        assert server.verdict("b", 1) == "wait"
        assert server.verdict("w", 3) == "take"  # told what is wanted, it brings something else
        assert "w does not have any more what it brought" in server.said[0]
        assert server.verdict("b", 1) == "take"

    def test_one_that_an_operator_removes_ends_it_whether_leases_run_out_or_not(self) -> None:
        server = Server(num_workers=1, lease_s=0.0)
        server.come("w", "b")
        server.rounds.replay(0, [[("w", 0)]])
        server.members.remove("w", "kicked")
        assert server.due() == []
        server.bring("b")
        assert server.due() == ["b"]

    def test_one_that_does_not_come_in_its_lease_ends_it(self) -> None:
        server = self.server()
        server.bring("a")
        server.silent_for(31, but=["a", "c"])
        assert server.due() == []
        assert server.verdict("c", 0) == "take"  # it goes on as any round does
        server.bring("c")
        assert server.due() == ["a", "c"]


def test_an_operator_may_wait_for_more_workers_and_for_fewer() -> None:
    server = Server(num_workers=1)
    server.come("a")
    server.rounds.change(num_workers=2)
    server.bring("a")
    assert server.due() == []
    server.rounds.change(num_workers=1)
    assert server.due() == ["a"]
    with pytest.raises(ConfigError, match="below min_workers"):
        server.rounds.change(num_workers=1, min_workers=3)
    with pytest.raises(ConfigError, match="round_timeout_s"):
        server.rounds.change(round_timeout_s=-1.0)


class TestCommands:
    def beat(self, server: Server, name: str, heard: int | None = 0) -> tuple[str | None, int]:
        beat = server.members.beat(name, key_of(name), Heartbeat(1, heard=heard), lambda _: 7)
        return beat.command, beat.number

    def test_a_removed_worker_is_told_to_stop_as_long_as_it_lives_and_may_come_back_after_that(self) -> None:
        server = Server(num_workers=1)
        server.come("a")
        server.members.remove("a", "kicked")
        server.rounds.left("a")
        with pytest.raises(ProtocolError) as unknown:
            server.members.require("a", key_of("a"))
        assert unknown.value.status == 410
        for _ in range(2):  # an answer may be lost
            command, number = self.beat(server, "a")
            assert command == "stop"
            with pytest.raises(ProtocolError, match="removed by the operator") as refused:
                server.members.register(Register("a", key_of("a")))
            assert refused.value.status == 410
        self.beat(server, "a", number)  # it saves, and is no worker that has come back
        assert not server.members.leave("a", key_of("a"))
        assert server.members.register(Register("a", key_of("a"))) == "back"

    def test_a_removed_worker_hears_it_from_a_server_that_was_started_again(self) -> None:
        server, again = Server(num_workers=1), Server(num_workers=1)
        server.come("a")
        server.members.remove("a", "kicked")
        again.members.load_state_dict(server.members.state_dict())
        command, number = self.beat(again, "a")
        assert command == "stop"
        assert number > 0

    @pytest.mark.parametrize("lease_s", [30.0, 0.0])
    def test_a_removed_worker_that_takes_no_leave_may_come_back_after_a_while(self, lease_s: float) -> None:
        server = Server(num_workers=1, lease_s=lease_s)
        server.come("a")
        server.members.remove("a", "kicked")
        server.time.now += 29
        self.beat(server, "a")
        server.time.now += 29
        with pytest.raises(ProtocolError, match="removed by the operator"):
            server.members.register(Register("a", key_of("a")))
        server.time.now += 2
        assert server.members.register(Register("a", key_of("a"))) == "back"

    def test_a_command_is_told_until_the_worker_says_that_it_has_heard_it(self) -> None:
        server = Server(num_workers=1)
        server.come("a", "b")
        assert server.members.command(None, "save") == ["a", "b"]
        first = self.beat(server, "a")
        assert first[0] == "save"
        assert self.beat(server, "a") == first  # the answer was lost
        assert self.beat(server, "a", first[1]) == (None, 0)
        server.members.command("a", "save")
        command, number = self.beat(server, "a", first[1])
        assert command == "save"
        assert number != first[1]
        with pytest.raises(ProtocolError, match="no live worker"):
            server.members.command("nobody", "stop")

    def test_one_that_cannot_say_so_is_told_once(self) -> None:
        server = Server(num_workers=1)
        server.come("a")
        server.members.command(None, "save")
        assert [self.beat(server, "a", None)[0] for _ in range(2)] == ["save", None]

    def test_what_is_stronger_is_not_overwritten(self) -> None:
        server = Server(num_workers=1)
        server.come("a")
        for command, told in (
            ("save", "save"),
            ("stop", "stop"),
            ("drain", "stop"),
            ("abort", "abort"),
            ("save", "abort"),
        ):
            server.members.command(None, command)  # type: ignore[arg-type]
            assert self.beat(server, "a")[0] == told

    def test_the_commands_of_a_server_that_was_started_again_are_not_taken_for_those_before(self) -> None:
        numbers = []
        for _ in range(2):
            server = Server(num_workers=1)
            server.come("a")
            server.members.command(None, "save")
            numbers.append(self.beat(server, "a")[1])
        assert numbers[0] != numbers[1]

    def test_a_worker_heeds_the_strongest_and_a_repeated_one_once(self) -> None:
        pulse = Pulse(1)
        pulse.hear(Beat(1, "save", 5))
        assert pulse.tell().heard == 5
        assert pulse.take_save()
        pulse.hear(Beat(1, "save", 5))  # the server has not heard that it was heard
        assert not pulse.take_save()
        pulse.hear(Beat(1, "stop", 6))
        pulse.hear(Beat(1, "save", 7))
        assert pulse.command == "stop"
        assert pulse.tell().heard == 7


def test_one_that_waits_for_others_and_makes_no_steps_is_as_fast_as_it_was() -> None:
    server = Server(num_workers=1)
    server.come("a")
    for said in (3.0, None):
        server.members.beat("a", key_of("a"), Heartbeat(1, said, said), lambda _: 1)
    assert (server.members["a"].steps_per_s, server.members["a"].tokens_per_s) == (3.0, 3.0)


class TestALateContributionThatWasCountedInALaterRound:
    """Its worker is killed before its next checkpoint, and sends it again for the round that it was made in."""

    def late(self, **others: object) -> Server:
        server = Server(num_workers=1, **others)  # type: ignore[arg-type]
        server.come("w", "b")
        server.bring("b")
        server.silent_for(31, but=["b"])
        assert server.close() == [("b", 0)]
        server.come("w")
        server.bring("w", base=0)
        server.bring("b")
        assert server.close() == [("b", 1), ("w", 1)]
        return server

    def test_it_is_not_counted_again(self) -> None:
        server = self.late()
        again = Server(num_workers=1)
        again.members.load_state_dict(server.members.state_dict())
        again.rounds.load_state_dict(server.rounds.state_dict())
        for each in (server, again):
            assert each.verdict("w", 0) == "counted"
            assert each.rounds.counted[0].has("w", 0)  # whoever asks for values with it finds it in them
            assert each.verdict("w", 1, base=0) == "counted"
            assert each.verdict("w", 2) == "take"

    def test_one_that_began_with_a_version_that_the_server_has_lost_does_not_hide_what_comes_next(self) -> None:
        server = self.late()
        assert server.verdict("w", 9) == Closed(version(2))
        server.bring("b")
        server.bring("w", base=9)
        server.close()
        assert server.verdict("w", 2) == "counted"
        server.bring("b")
        server.silent_for(31, but=["b"])
        server.close()
        assert server.verdict("w", 3) == Closed(version(4))  # begun with a lower number, and new

    def test_another_worker_of_that_name_has_nothing_to_do_with_it(self) -> None:
        server = self.late()
        server.rounds.renamed("w", "w~old")
        assert server.verdict("w", 0) == Closed(version(2))
