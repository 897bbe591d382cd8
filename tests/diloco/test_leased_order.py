"""The order of a worker's samples: the rows that are leased to it, leased ahead, and the same after a resume."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from forgather.data import packing
from forgather.data.loader import Loader
from forgather.data.order import Permutation
from forgather.diloco.client import UnreachableError
from forgather.diloco.lease_desk import LeaseDesk
from forgather.diloco.leased_order import LeasedOrder
from forgather.diloco.work_units import Lease, Question, WorkUnits
from forgather.errors import DataError, DistributedError
from tests.diloco.test_worker import wait_for

ROWS, UNITS = 23, 5
ROWS_PER_STEP, SYNC_EVERY = 2, 3
ROUND = ROWS_PER_STEP * SYNC_EVERY
FOREVER = 10**9


class Server:
    """Answers in this process, and can be away."""

    def __init__(self, num_units: int = UNITS) -> None:
        self.units = WorkUnits(num_units)
        self.is_away = False
        self.questions: list[Question] = []
        self._one_at_a_time = threading.Lock()

    def desk(self, worker: str, said: list[str] | None = None) -> LeaseDesk:
        desk = LeaseDesk(is_open=True)
        desk.join(Membership(self, worker), (said if said is not None else []).append)
        return desk

    def order(self, worker: str, seed: int = 7, rows: int = ROWS) -> LeasedOrder:
        return LeasedOrder(Permutation(rows, seed), self.desk(worker), rows_per_step=ROWS_PER_STEP)

    def leases(self, question: Question) -> tuple[list[Lease], list[tuple[int, int]]]:
        with self._one_at_a_time:
            self.questions.append(question)
            if self.is_away:
                raise UnreachableError("away")
            answer = self.units.lease(question)
            return answer.leases, answer.lost


class Membership:
    """A place at that server, and the connection there."""

    def __init__(self, server: Server, worker: str) -> None:
        self.settings = SimpleNamespace(sync_every=SYNC_EVERY)
        self.request = SimpleNamespace(worker=worker)
        self.server = server
        self.is_aborted = False

    def note(self, error: UnreachableError) -> None:
        """Nobody was removed."""

    def borrow(self) -> "Membership":
        return self

    def give_back(self, client: "Membership") -> None:
        pass

    def abort(self) -> None:
        self.is_aborted = True

    def leases(self, question: Question) -> tuple[list[Lease], list[tuple[int, int]]]:
        if self.is_aborted:
            raise UnreachableError("this worker has ended its exchanges")
        return self.server.leases(question)


def got(order: LeasedOrder, first: int, count: int, end: int = FOREVER) -> np.ndarray:
    assert order.reserve(first, first + count, end)
    return order.samples(first, count)


def rows_of(consumed: dict[str, int]) -> list[int]:
    return [row for first, length in consumed.items() for row in range(int(first), int(first) + length)]


def test_two_workers_train_each_row_once():
    server = Server()
    one, other = server.order("one"), server.order("other")
    samples = [got(one, 0, 4), got(other, 0, 9), got(one, 4, 50), got(other, 9, 40)]
    rows = [row for each, count in ((one, 54), (other, 49)) for row in rows_of(each.consumed(0, count))]
    assert [Permutation(ROWS, 7).sample(row) for row in rows_of(one.consumed(0, 4))] == samples[0].tolist()
    assert sorted(Permutation(ROWS, 7).sample(row) for row in rows) == sorted(np.concatenate(samples).tolist())
    assert len(rows) == 103 == len(set(rows))
    assert one.sample(5) == one.samples(0, 10)[5]


@pytest.mark.parametrize("rows", [2, ROWS])  # also of fewer rows than units
@pytest.mark.parametrize("rows_per_step", [1, 3, 10])  # 10 reach over two and three units
def test_a_worker_that_is_alone_has_the_rows_of_a_plain_run(rows_per_step, rows):
    order, whole = Server().order("one", rows=rows), Permutation(rows, 7)
    for first in range(0, 60, rows_per_step):
        assert np.array_equal(got(order, first, rows_per_step), whole.samples(first, rows_per_step))
    assert len(order.state_dict()["leases"]) == 1


def test_a_resumed_run_goes_on_with_its_rows_and_keeps_its_description():
    server = Server()
    order = server.order("one")
    expected = got(order, 0, 12)
    state, said = order.state_dict(), order.describe()
    got(server.order("other"), 0, 10)
    resumed = server.order("one")
    resumed.load_state_dict(state)
    assert resumed.describe() == said
    asked = len(server.questions)
    assert np.array_equal(resumed.samples(2, 6), expected[2:8])
    assert len(server.questions) == asked  # what it had is in its state
    assert np.array_equal(got(resumed, 0, 40)[:12], expected)
    assert np.array_equal(got(resumed, 0, 40), got(order, 0, 40))  # the same questions have the same answers


def test_two_rounds_are_leased_ahead_with_one_question_a_round():
    server = Server(num_units=ROWS)
    order = server.order("one")
    for step in range(10 * SYNC_EVERY):
        first = step * ROWS_PER_STEP
        assert order.reserve(0, first + ROWS_PER_STEP, FOREVER)
        wait_for(lambda: order._desk._asking is None, 5)
        assert order._begins[-1] >= first + 2 * ROUND or step == 0
    assert len(server.questions) <= 10 + 2


def test_an_outage_of_two_rounds_stalls_nothing_and_a_longer_one_is_waited_out():
    server = Server(num_units=ROWS)
    order = server.order("one")
    assert order.reserve(0, ROWS_PER_STEP, FOREVER)
    wait_for(lambda: order.reserve(0, ROWS_PER_STEP, FOREVER) and order._begins[-1] > 2 * ROUND, 5)
    server.is_away = True
    done = ROWS_PER_STEP
    for _ in range(2 * SYNC_EVERY):
        done += ROWS_PER_STEP
        order._desk = Impatient(order._desk)  # the rows are there without a wait
        assert order.reserve(0, done, FOREVER)
    order._desk = order._desk.desk
    assert not order.reserve(0, done + 2 * ROUND, FOREVER)
    server.is_away = False
    wait_for(lambda: order.reserve(0, done + 2 * ROUND, FOREVER), 10)
    whole = Permutation(ROWS, 7)
    assert np.array_equal(order.samples(0, done + 2 * ROUND), whole.samples(0, done + 2 * ROUND))


class Impatient:
    """A desk at which nobody waits."""

    def __init__(self, desk) -> None:
        self.desk = desk.desk if isinstance(desk, Impatient) else desk

    def hear(self, wait_s: float):
        assert wait_s == 0
        return self.desk.hear(0)

    def __getattr__(self, name: str):
        return getattr(self.desk, name)


def test_no_more_is_leased_than_the_run_trains():
    server = Server(num_units=ROWS)
    order = server.order("one")
    for done in range(ROWS_PER_STEP, 11, ROWS_PER_STEP):
        assert order.reserve(0, done, end=10)
    assert server.units.status()["leased"] == 10
    assert order.reserve(0, 12, end=18)  # a run that is made longer
    assert server.units.status()["leased"] == 18


def test_who_comes_back_does_not_train_what_others_have_by_now():
    server = Server(num_units=ROWS)
    for name in ("one", "other"):
        server.units.begin(name, "run")
    one, other = server.order("one"), server.order("other")
    got(one, 0, ROWS_PER_STEP)
    trained = one.consumed(0, ROWS_PER_STEP)
    state = one.state_dict()
    held = rows_of(one.consumed(ROWS_PER_STEP, one._begins[-1]))
    server.units.count("one", trained)
    server.units.release("one")  # stopped, and started again when another has been there
    others = got(other, 0, 2 * ROWS_PER_STEP), rows_of(other.consumed(0, other._begins[-1]))
    server.units.begin("one", "run")
    resumed = server.order("one")
    resumed.load_state_dict(state)
    assert resumed.reserve(ROWS_PER_STEP, 10 * ROUND, FOREVER)
    rows = rows_of(resumed.consumed(0, 10 * ROUND))
    assert rows[:ROWS_PER_STEP] == rows_of(trained)
    assert set(held) & set(others[1])
    assert not set(rows) & set(others[1])
    assert len(set(rows)) == len(rows)
    # And one that finds nobody has had its rows has them all.
    again = server.order("one")
    again.load_state_dict(resumed.state_dict())
    assert again.reserve(ROWS_PER_STEP, 10 * ROUND, FOREVER)
    assert rows_of(again.consumed(0, 10 * ROUND)) == rows


def test_rows_that_are_read_stay_what_they_are():
    server = Server(num_units=ROWS)
    one, other = server.order("one"), server.order("other")
    before = got(one, 0, 6).tolist()
    server.units.release("one")  # its network is away for too long
    assert other.reserve(0, 2, FOREVER)
    taken_by_other = rows_of(other.consumed(0, other._begins[-1]))
    assert taken_by_other[0] == 0
    after = got(one, 6, 6 * ROUND)
    assert one.samples(0, 6).tolist() == before
    assert not set(rows_of(one.consumed(6, 6 + len(after)))) & set(taken_by_other)


def test_leases_are_forgotten_when_their_rows_have_been_told():
    server = Server(num_units=ROWS)
    one, other = server.order("one"), server.order("other")
    told = 0
    for done in range(ROUND, 60 * ROUND, ROUND):
        got(one, done - ROUND, ROUND), got(other, done - ROUND, ROUND)
        assert sum(one.consumed(told, done).values()) == ROUND
        told = done
        wait_for(lambda: one._desk._asking is None and other._desk._asking is None, 5)
    state = one.state_dict()
    assert state["num_leased"] > 25
    assert len(state["leases"]) < 10
    resumed = server.order("one")
    resumed.load_state_dict(state)
    assert resumed.consumed(told - 1, told) == one.consumed(told - 1, told)
    assert np.array_equal(got(resumed, told, 3 * ROUND), got(one, told, 3 * ROUND))


def test_who_waits_for_rows_is_back_soon_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr("forgather.diloco.leased_order._WAIT_S", 0.01)
    monkeypatch.setattr("forgather.diloco.lease_desk._SAY_AFTER_S", 0.0)
    server, said = Server(), []
    server.is_away = True
    order = LeasedOrder(Permutation(ROWS, 7), server.desk("one", said), rows_per_step=ROWS_PER_STEP)
    for _ in range(4):
        assert not order.reserve(0, 1, FOREVER)
    assert len(said) == 1
    assert "no rows to train on" in said[0]
    assert "(away)" in said[0]


class Ranks:
    """Two ranks, one after the other: what rank 0 tells waits for rank 1, which has to ask for it as often."""

    def __init__(self, monkeypatch) -> None:
        self.rank = 0
        self.told: list = []
        monkeypatch.setattr("forgather.diloco.leased_order.rank", lambda: self.rank)
        monkeypatch.setattr("forgather.diloco.leased_order.broadcast_object", self.broadcast)

    def broadcast(self, value):
        if self.rank == 0:
            self.told.append(value)
            return value
        return self.told.pop(0)

    def reserve(self, orders: list[LeasedOrder], stop: int) -> bool:
        answers = set()
        for self.rank, order in enumerate(orders):
            answers.add(order.reserve(stop - 2, stop, FOREVER))
        assert not self.told, "rank 0 tells what rank 1 does not wait for"
        [answer] = answers
        return answer


def test_no_rank_has_rows_that_another_has_not_and_rank_0_asks_for_all(monkeypatch):
    monkeypatch.setattr("forgather.diloco.leased_order._WAIT_S", 0.01)
    server, silent = Server(num_units=ROWS), Server()
    ranks, orders = Ranks(monkeypatch), [server.order("one"), silent.order("one")]
    done = 0
    deadline = time.monotonic() + 60
    while done <= 60 and time.monotonic() < deadline:
        server.is_away = 20 <= done < 60 and not (server.is_away and done + 2 >= orders[0]._begins[-1])
        if ranks.reserve(orders, done + 2):
            assert np.array_equal(*(order.samples(done, 2) for order in orders))
            done += 2
    assert done > 60
    assert not silent.questions
    assert orders[0].state_dict() == orders[1].state_dict()
    # As saved by one, and loaded by ranks of which one is new.
    for order in orders:
        order.load_state_dict(orders[0].state_dict())
    assert ranks.reserve(orders, done)


def test_all_ranks_hear_of_a_refusal(monkeypatch):
    server = Server()
    assert server.order("other").reserve(0, 1, FOREVER)
    ranks, orders = Ranks(monkeypatch), [server.order("one", seed=8), server.order("one", seed=8)]
    for ranks.rank, order in enumerate(orders):
        with pytest.raises(DataError, match="leases no rows"):
            order.reserve(0, 1, FOREVER)


def test_a_refusal_ends_the_run_and_names_the_difference_and_the_way_out():
    server = Server()
    got(server.order("one"), 0, 1)
    other = server.order("other", seed=8)
    with pytest.raises(DataError, match=r"seed 7 with 23 rows an epoch; this worker has .*seed 8") as caught:
        other.reserve(0, 1, FOREVER)
    assert "--no-diloco-leased" in caught.value.fix


def test_nothing_is_asked_after_the_worker_has_left(monkeypatch):
    monkeypatch.setattr("forgather.diloco.leased_order._WAIT_S", 0.01)
    server = Server()
    server.is_away = True
    order = server.order("one")
    assert not order.reserve(0, 1, FOREVER)
    asking = order._desk._asking
    order._desk.leave()
    assert not asking.is_alive()
    server.is_away = False
    asked = len(server.questions)
    assert not order.reserve(0, 1, FOREVER)
    assert len(server.questions) == asked
    assert server.units.status()["leased"] == 0


def test_before_a_server_is_joined_rows_are_those_of_the_run_alone_and_none_is_leased():
    order, whole = LeasedOrder(Permutation(ROWS, 7), LeaseDesk(True), rows_per_step=2), Permutation(ROWS, 7)
    assert np.array_equal(order.samples(5, 40), whole.samples(5, 40))
    with pytest.raises(DistributedError, match="has not joined") as caught:
        order.reserve(0, 1, FOREVER)
    assert "--no-diloco-leased" in caught.value.fix


def test_a_state_of_another_order_is_refused_and_the_way_out_is_named():
    leased, own = Server().order("one"), Permutation(ROWS, 7)
    with pytest.raises(DataError, match="another order") as caught:
        Server().order("one", seed=8).load_state_dict(leased.state_dict())
    assert "--fresh" in caught.value.fix
    with pytest.raises(DataError, match="another order") as caught:
        leased.load_state_dict(own.state_dict())
    assert "--no-diloco-leased" in caught.value.fix
    with pytest.raises(DataError, match="another order") as caught:
        own.load_state_dict(leased.state_dict())
    assert "--diloco-server" in caught.value.fix


class Blocks:
    """Blocks that say which they are, as the loader wants them."""

    block_length = 4

    def __init__(self, number: int = ROWS) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def gather(self, indices):
        rows = np.repeat(np.asarray(indices)[:, None], self.block_length, axis=1)
        return packing.Blocks(rows, rows, rows)

    def describe(self) -> str:
        return "blocks"


def loader(order, rank: int = 0, ranks: int = 1, workers: int = 0) -> Loader:
    return Loader(
        Blocks(), order, rows_per_step=4, rows_per_forward=4, data_rank=rank, data_ranks=ranks, workers=workers
    )


def taken(data: Loader, steps_left: int = 1000) -> list[int]:
    assert data.has_rows(steps_left)
    return [int(row) for batch in data.take() for row in batch.input_ids[:, 0]]


def test_the_loaders_of_two_ranks_and_of_a_resumed_run_have_the_rows_of_one():
    server = Server()
    alone = loader(server.order("one"))
    ranks = [loader(server.order("one"), rank, 2) for rank in range(2)]
    expected = [taken(alone) for _ in range(6)]
    assert [taken(ranks[0]) + taken(ranks[1]) for _ in range(3)] == expected[:3]
    resumed = loader(server.order("one"))
    resumed.load_state_dict(ranks[0].state_dict())
    assert [taken(resumed) for _ in range(3)] == expected[3:]
    for data in (alone, resumed, *ranks):
        data.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_ahead_no_more_than_is_leased(workers):
    server = Server(num_units=ROWS)
    data, plain = loader(server.order("one"), workers=workers), loader(Permutation(ROWS, 7))
    assert [taken(data, 10 - step) for step in range(10)] == [taken(plain) for _ in range(10)]
    data.close(), plain.close()
    ahead = 2 * workers or 1  # steps
    assert server.units.status()["leased"] == (10 + ahead) * 4


def test_a_loader_without_rows_says_so_and_closes_at_once():
    server = Server()
    data = loader(server.order("one"))
    first = taken(data)
    server.is_away = True
    steps = 0
    while data.has_rows(1000):
        data.take()
        steps += 1
    assert steps >= 2 * ROUND // 4
    data.close()
    assert first == loader(Permutation(ROWS, 7)).take()[0].input_ids[:, 0].tolist()
