"""Work units: every row of an epoch is leased once, however workers come and go, and the ledger says it all."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather.diloco.lease_journal import LeaseJournal
from forgather.diloco.messages import ProtocolError
from forgather.diloco.spans import Spans
from forgather.diloco.work_units import Lease, WorkUnits
from forgather.errors import ConfigError

ORDER = "permutation of 10 blocks, seed 0"


def consumed(lease: Lease, rows: int | None = None) -> dict[str, int]:
    return {str(lease.first): lease.length if rows is None else rows}


def ask(worker: str, sequence: int, rows: int = 10, order: str = ORDER) -> dict:
    return {"worker": worker, "sequence": sequence, "rows": rows, "order": order}


@pytest.mark.training_case(82)
def test_units_of_ten_rows_in_three():
    units = WorkUnits(3)
    answers = [units.answer(ask("a", sequence)) for sequence in range(4)]
    assert [(each["start"], each["length"]) for each in answers] == [(0, 3), (3, 3), (6, 4), (0, 3)]
    assert [(each["unit"], each["epoch"]) for each in answers] == [(0, 0), (1, 0), (2, 0), (3, 1)]


@pytest.mark.training_case(82)
@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_units_are_an_epoch_exactly(rows, num_units, num_workers):
    units = WorkUnits(num_units)
    leased: list[int] = []
    sequence = 0
    while len(leased) < 2 * rows:
        for worker in map(str, range(num_workers)):
            answer = units.answer(ask(worker, sequence, rows))
            assert answer["length"] >= 1
            assert answer["start"] == (answer["unit"] % num_units) * rows // num_units
            first = answer["epoch"] * rows + answer["start"]
            leased += range(first, first + answer["length"])
        sequence += 1
    assert leased == list(range(len(leased)))


@pytest.mark.training_case(82)
def test_a_dead_workers_rows_are_leased_again_first():
    units = WorkUnits(3)
    dead = units.lease("dead", 0, 10, ORDER)
    units.count("dead", consumed(dead, 1))  # one of its three rows was in a contribution that counted
    units.release("dead")
    assert units.lease("other", 0, 10, ORDER) == Lease(1, 2)
    assert units.lease("other", 1, 10, ORDER) == Lease(3, 3)
    assert units.status() | {"trained": 1, "lost": 2, "leased": 5, "taken_back": 0} == units.status()


def test_the_same_question_has_the_same_answer():
    units = WorkUnits(3)
    first = units.answer(ask("a", 0))
    units.answer(ask("b", 0))
    assert units.answer(ask("a", 0)) == first
    units.release("a")
    units.answer(ask("b", 1))
    assert units.answer(ask("a", 0)) == first  # also when another has its rows by now


def test_a_worker_that_is_back_in_time_has_its_rows_again():
    units = WorkUnits(2)
    units.begin("a", "run")
    lease = units.lease("a", 0, 10, ORDER)
    units.release("a")
    units.begin("a", "run")
    assert units.lease("b", 0, 10, ORDER).first == lease.stop
    units.count("a", consumed(lease))
    assert units.status() | {"trained": 5, "lost": 0, "repeated": 0, "taken_back": 0} == units.status()


def test_another_run_of_a_name_begins_anew():
    units = WorkUnits(2)
    units.begin("a", "run")
    units.lease("a", 0, 10, ORDER)
    units.begin("a", "another")
    assert units.lease("a", 0, 10, ORDER) == Lease(0, 5)  # taken back from the run that is gone, and leased again first
    assert units.lease("a", 1, 10, ORDER) == Lease(5, 5)
    assert units.status()["lost"] == 5


def test_rows_of_a_late_contribution_are_not_leased_again_and_repeats_are_counted():
    units = WorkUnits(2)
    evicted = units.lease("evicted", 0, 10, ORDER)
    units.release("evicted")
    units.count("evicted", consumed(evicted, 2))  # came after all, before anyone else had the rows
    other = units.lease("other", 0, 10, ORDER)
    assert other == Lease(2, 3)
    units.count("other", consumed(other))
    units.count("evicted", {"2": 1})  # and these rows another has trained as well
    assert units.status() | {"trained": 5, "repeated": 1, "lost": 2} == units.status()
    units.release("other")  # nothing is open, nothing comes back
    assert units.status()["taken_back"] == 0


def test_rows_that_were_trained_after_all_are_not_taken_back():
    units = WorkUnits(2)
    lease = units.lease("evicted", 0, 10, ORDER)
    units.release("evicted")
    assert units.lease("other", 0, 10, ORDER) == lease
    units.count("evicted", consumed(lease, 3))  # while the other is at it
    units.release("other")
    assert units.lease("third", 0, 10, ORDER) == Lease(3, 2)


def test_refused_work_is_lost_and_its_rows_are_trained_by_others():
    units = WorkUnits(2)
    lease = units.lease("nan", 0, 10, ORDER)
    units.refuse("nan", consumed(lease, 2))
    assert units.status() | {"lost": 2, "taken_back": 2, "leased": 3} == units.status()
    assert units.lease("other", 0, 10, ORDER) == Lease(0, 2)


@given(st.data(), st.integers(1, 60), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_every_row_is_leased_once_however_workers_come_and_go(data, rows, num_units):
    """As long as the dead do not come back: a row is open with one worker, taken back, trained or not leased yet.

    When those that are left have brought in all they have, each row was trained once. Saved and loaded at any moment.
    """
    units = WorkUnits(num_units)
    open_rows: dict[str, list[int]] = {}  # by worker: what this test was told, and has not brought in
    sequences: Counter[str] = Counter()
    trained: Counter[int] = Counter()
    num_born = 0

    def lease(worker: str) -> None:
        answer = units.answer(ask(worker, sequences[worker], rows))
        sequences[worker] += 1
        first = answer["epoch"] * rows + answer["start"]
        new = range(first, first + answer["length"])
        held = {row for others in open_rows.values() for row in others}
        assert not held & set(new)
        assert not any(trained[row] for row in new)
        open_rows[worker] += new

    def bring(worker: str, num_rows: int) -> None:
        done, open_rows[worker] = open_rows[worker][:num_rows], open_rows[worker][num_rows:]
        trained.update(done)
        units.count(worker, {str(start): stop - start for start, stop in Spans((row, row + 1) for row in done)})

    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["come", "lease", "bring", "die", "save"]))
        if action == "come" or not open_rows:
            open_rows[f"w{num_born}"] = []
            num_born += 1
        elif action == "save":
            state = json.loads(json.dumps(units.state_dict()))
            units = WorkUnits(num_units)
            units.load_state_dict(state)
        else:
            worker = data.draw(st.sampled_from(sorted(open_rows)))
            if action == "lease":
                lease(worker)
            elif action == "bring":
                bring(worker, data.draw(st.integers(0, 10)))
            else:
                units.release(worker)
                del open_rows[worker]
    survivor = "survivor"
    open_rows[survivor] = []
    for worker in sorted(open_rows):
        bring(worker, len(open_rows[worker]))
    while len(units._returned) or len(trained) < rows:
        lease(survivor)
        bring(survivor, len(open_rows[survivor]))
    assert set(trained) == set(range(len(trained)))
    assert set(trained.values()) == {1}
    assert units.status() | {"trained": len(trained), "repeated": 0, "leased": 0} == units.status()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 12)), max_size=25))
@settings(max_examples=200, deadline=None)
def test_spans_are_sets_of_rows(changes):
    spans, rows = Spans(), set()
    for is_added, start, length in changes:
        these = set(range(start, start + length))
        there = len(rows & these)
        assert spans.count(start, start + length) == there
        assert (spans.add if is_added else spans.remove)(start, start + length) == there
        rows = rows | these if is_added else rows - these
        pairs = list(spans)
        assert [row for left, right in pairs for row in range(left, right)] == sorted(rows)
        assert all(one[1] < other[0] for one, other in pairwise(pairs))
        outside = [row for row in range(3, 30) if row not in rows]
        first = spans.first_outside(3, 30)
        assert (first is None) if not outside else (first is not None and first[0] == outside[0])
        if first is not None:
            assert not rows & set(range(*first))
            assert first[1] == 30 or first[1] in rows
    assert list(Spans.from_json(json.loads(json.dumps(spans.to_json())))) == list(spans)


def test_a_server_that_was_killed_says_the_same_again(tmp_path):
    units = WorkUnits(4)
    journal = LeaseJournal(tmp_path / "leases", units)
    units.begin("a", "run")
    before = journal.answer(ask("a", 0))
    saved = json.loads(json.dumps(units.state_dict()))
    between = journal.answer(ask("b", 0))
    after = journal.answer(ask("a", 1))
    with (tmp_path / "leases").open("ab") as file:  # killed while it wrote the next one
        file.write(b'["a","run",2,')
    again = WorkUnits(4)
    again.load_state_dict(saved)
    restarted = LeaseJournal(tmp_path / "leases", again)
    fresh = restarted.answer(ask("c", 0))
    assert fresh["unit"] == 3
    assert restarted.answer(ask("a", 1)) == after
    assert restarted.answer(ask("b", 0)) == between
    assert restarted.answer(ask("a", 0)) == before
    # And so says one that lost its state as well.
    empty = WorkUnits(4)
    assert LeaseJournal(tmp_path / "leases", empty).answer(ask("a", 1)) == after
    assert empty.answer(ask("c", 0)) == fresh


def test_the_journal_leaves_out_runs_that_are_over(tmp_path):
    units = WorkUnits(4)
    journal = LeaseJournal(tmp_path / "leases", units)
    units.begin("a", "old")
    journal.answer(ask("a", 0))
    journal.answer(ask("a", 1))
    units.begin("a", "new")
    saved = units.state_dict()
    new = journal.answer(ask("a", 0))
    again = WorkUnits(4)
    again.load_state_dict(saved)
    restarted = LeaseJournal(tmp_path / "leases", again)
    assert restarted.answer(ask("a", 0)) == new
    assert not again.has_leased("a", 1)


def test_another_order_is_refused_and_the_difference_named():
    units = WorkUnits(3)
    units.answer(ask("a", 0))
    with pytest.raises(
        ProtocolError, match=r"seed 0 with 10 rows an epoch; this worker has .*seed 1 with 10"
    ) as caught:
        units.answer(ask("b", 0, order="permutation of 10 blocks, seed 1"))
    assert caught.value.status == 422
    with pytest.raises(ProtocolError, match="12 rows"):
        units.answer(ask("b", 0, rows=12))
    assert units.status()["leased"] == 3


@pytest.mark.parametrize(
    "request_", [{}, [], None, ask("", 0), ask("a", -1), ask("a", 0, rows=0), ask("a", 0) | {"sequence": "0"}]
)
def test_what_is_no_request_is_refused(request_):
    units = WorkUnits(3)
    with pytest.raises(ProtocolError):
        units.answer(request_)
    assert units.rows is None


@pytest.mark.parametrize("wrong", [{"x": 1}, {"-1": 1}, {"0": 0}, {"0": 2**62}, {"9" * 30: 1}, {"\u0663": 1}])
def test_what_cannot_be_counted_is_refused(wrong):
    with pytest.raises(ProtocolError):
        WorkUnits(3).check(wrong)


def test_the_number_of_units_stays():
    with pytest.raises(ConfigError, match="0 units"):
        WorkUnits(0)
    with pytest.raises(ConfigError, match="has 3 work units an epoch, not 4"):
        WorkUnits(4).load_state_dict(WorkUnits(3).state_dict())
