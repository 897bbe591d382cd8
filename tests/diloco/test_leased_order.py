"""The order of a worker's samples: the rows that are leased to it, the same on each rank and after a resume."""

import threading
import time

import numpy as np
import pytest

from forgather.data import packing
from forgather.data.loader import Loader
from forgather.data.order import Permutation
from forgather.diloco.client import UnreachableError
from forgather.diloco.leased_order import LeasedOrder
from forgather.diloco.work_units import WorkUnits
from forgather.errors import DataError

ROWS, UNITS = 23, 5


class Server:
    """Answers in this process, and can be away."""

    def __init__(self) -> None:
        self.units = WorkUnits(UNITS)
        self.is_away = False
        self.num_asked = 0
        self._one_at_a_time = threading.Lock()

    def asked_by(self, worker: str):
        def ask(sequence: int, rows: int, order: str) -> dict[str, int]:
            with self._one_at_a_time:
                self.num_asked += 1
                if self.is_away:
                    raise UnreachableError("away")
                return self.units.answer({"worker": worker, "sequence": sequence, "rows": rows, "order": order})

        return ask

    def order(self, worker: str, **arguments) -> LeasedOrder:
        return LeasedOrder(Permutation(ROWS, 7), self.asked_by(worker), **arguments)


def rows_of(consumed: dict[str, int]) -> list[int]:
    return [row for first, length in consumed.items() for row in range(int(first), int(first) + length)]


def test_two_workers_train_each_row_once():
    server = Server()
    one, other = server.order("one"), server.order("other")
    samples = [one.samples(0, 4), other.samples(0, 9), one.samples(4, 3), other.samples(9, 2)]
    rows = [row for each, count in ((one, 7), (other, 11)) for row in rows_of(each.consumed(0, count))]
    assert sorted(Permutation(ROWS, 7).sample(row) for row in rows) == sorted(np.concatenate(samples).tolist())
    assert len(rows) == 18 == len(set(rows))
    assert one.sample(5) == one.samples(0, 10)[5]


@pytest.mark.parametrize("rows_per_step", [1, 3, 10])  # 10 reach over two and three units
def test_steps_may_reach_over_units(rows_per_step):
    order, whole = Server().order("one"), Permutation(ROWS, 7)
    for first in range(0, 60, rows_per_step):
        assert np.array_equal(order.samples(first, rows_per_step), whole.samples(first, rows_per_step))


def test_each_rank_asks_for_itself_and_has_the_same():
    server = Server()
    first_rank, second_rank = server.order("one"), server.order("one")
    other = server.order("other")
    first_rank.samples(0, 3)
    other.samples(0, 8)
    second_rank.samples(0, 12)
    assert np.array_equal(first_rank.samples(0, 12), second_rank.samples(0, 12))


def test_a_resumed_run_goes_on_with_its_rows_and_keeps_its_description():
    server = Server()
    order = server.order("one")
    expected = order.samples(0, 12)
    state, said = order.state_dict(), order.describe()
    server.order("other").samples(0, 10)
    resumed = server.order("one")
    resumed.load_state_dict(state)
    assert resumed.describe() == said
    asked = server.num_asked
    assert np.array_equal(resumed.samples(2, 6), expected[2:8])
    assert server.num_asked == asked  # what it had is in its state
    assert np.array_equal(resumed.samples(0, 20)[:12], expected)
    assert np.array_equal(resumed.samples(0, 20), order.samples(0, 20))


def test_a_server_that_is_away_for_less_than_a_unit_is_not_missed():
    server = Server()
    order = server.order("one")
    order.samples(0, 1)
    deadline = time.monotonic() + 5
    while len(order.state_dict()["leases"]) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.is_away = True
    begun = time.monotonic()
    order.samples(1, 8)  # to the end of the second unit
    assert time.monotonic() - begun < 0.1
    back = threading.Timer(0.3, lambda: setattr(server, "is_away", False))
    back.start()
    whole = Permutation(ROWS, 7).samples(9, 5)
    assert np.array_equal(order.samples(9, 5), whole)
    assert time.monotonic() - begun > 0.25


def test_a_server_that_stays_away_ends_the_run_with_the_reason():
    server = Server()
    server.is_away = True
    with pytest.raises(DataError, match=r"no rows to train on for 0 s.*: away"):
        server.order("one", patience_s=0.05).samples(0, 1)


def test_a_refusal_ends_the_run_and_names_the_difference():
    server = Server()
    server.order("one").samples(0, 1)
    other = LeasedOrder(Permutation(ROWS, 8), server.asked_by("other"))
    with pytest.raises(DataError, match=r"seed 7 with 23 rows an epoch; this worker has .*seed 8"):
        other.samples(0, 1)


def test_whoever_waits_is_told_that_the_run_is_over():
    server = Server()
    server.is_away = True
    order = server.order("one")
    threading.Timer(0.1, order.close).start()
    with pytest.raises(DataError, match="ending"):
        order.samples(0, 1)


def test_what_a_contribution_holds_is_counted_as_trained():
    server = Server()
    one, other = server.order("one"), server.order("other")
    one.samples(0, 3), other.samples(0, 3), one.samples(3, 3)
    server.units.check(one.consumed(0, 6))
    server.units.count("one", one.consumed(0, 2))
    server.units.count("one", one.consumed(2, 6))
    assert server.units.status() | {"trained": 6, "repeated": 0} == server.units.status()
    whole = Permutation(ROWS, 7)
    assert [whole.sample(row) for row in rows_of(one.consumed(0, 6))] == one.samples(0, 6).tolist()


def test_without_a_server_it_is_the_order_itself():
    order, whole = LeasedOrder(Permutation(ROWS, 7)), Permutation(ROWS, 7)
    assert np.array_equal(order.samples(5, 40), whole.samples(5, 40))
    assert order.describe() == whole.describe()
    order.load_state_dict(whole.state_dict())
    assert order.consumed(0, 5) == {}


def test_a_state_of_another_order_is_refused():
    state = Server().order("one").state_dict()
    with pytest.raises(DataError, match="another order"):
        LeasedOrder(Permutation(ROWS, 8), Server().asked_by("one")).load_state_dict(state)
    with pytest.raises(DataError, match="another order"):
        LeasedOrder(Permutation(ROWS, 7)).load_state_dict(state)


class Blocks:
    """Blocks that say which they are, as the loader wants them."""

    block_length = 4

    def __len__(self) -> int:
        return ROWS

    def gather(self, indices):
        rows = np.repeat(np.asarray(indices)[:, None], self.block_length, axis=1)
        return packing.Blocks(rows, rows, rows)

    def describe(self) -> str:
        return "blocks"


def loader(order: LeasedOrder, rank: int = 0, ranks: int = 1) -> Loader:
    return Loader(Blocks(), order, rows_per_step=4, rows_per_forward=4, data_rank=rank, data_ranks=ranks)


def taken(data: Loader) -> list[int]:
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
        data.order.close()
        data.close()
