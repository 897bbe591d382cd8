"""Work units: every row of an epoch is leased once, however workers come and go, and the ledger says it all."""

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather.diloco.consumed import require_leased
from forgather.diloco.frame import ProtocolError
from forgather.diloco.lease_journal import LeaseJournal
from forgather.diloco.spans import Spans
from forgather.diloco.work_units import KEPT_LEASES, Lease, Question, WorkUnits
from forgather.errors import ConfigError

ORDER = "permutation of 10 blocks, seed 0"


def consumed(lease: Lease, rows: int | None = None) -> dict[str, int]:
    return {str(lease.first): lease.length if rows is None else rows}


def ask(worker: str, sequence: int, rows: int = 10, order: str = ORDER, at_least: int = 1) -> dict:
    return {"worker": worker, "sequence": sequence, "rows": rows, "order": order, "at_least": at_least, "held": []}


def leased(units: WorkUnits, worker: str, sequence: int, **others) -> list[Lease]:
    return units.lease(Question.from_json(ask(worker, sequence, **others))).leases


def one_lease(units: WorkUnits, worker: str, sequence: int, **others) -> Lease:
    [only] = leased(units, worker, sequence, **others)
    return only


@pytest.mark.training_case(82)
def test_units_of_ten_rows_in_three():
    units = WorkUnits(3)
    leases = [one_lease(units, "a", sequence) for sequence in range(4)]
    assert [(each.first, each.length) for each in leases] == [(0, 3), (3, 3), (6, 4), (10, 3)]


@pytest.mark.training_case(82)
@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 3), st.integers(1, 450))
@settings(max_examples=120, deadline=None)
def test_units_are_an_epoch_exactly(rows, num_units, num_workers, at_least):
    units = WorkUnits(num_units)
    begins = {unit * rows // num_units for unit in range(num_units)}
    all_rows: list[int] = []
    sequence = 0
    while len(all_rows) < 2 * rows:
        for worker in map(str, range(num_workers)):
            given_ = one_lease(units, worker, sequence, rows=rows, at_least=at_least)
            assert {given_.first % rows, given_.stop % rows} <= begins
            assert at_least <= given_.length < at_least + max(1, -(-rows // num_units))
            all_rows += range(given_.first, given_.stop)
        sequence += 1
    assert all_rows == list(range(len(all_rows)))


@pytest.mark.training_case(82)
def test_a_dead_workers_rows_are_leased_again_first():
    units = WorkUnits(3)
    dead = one_lease(units, "dead", 0)
    units.count("dead", consumed(dead, 1))  # one of its three rows was in a contribution that counted
    units.release("dead")
    assert one_lease(units, "other", 0) == Lease(1, 2)
    assert one_lease(units, "other", 1) == Lease(3, 3)
    assert units.status() | {"trained": 1, "lost": 2, "leased": 5, "taken_back": 0} == units.status()


def test_what_a_dead_worker_has_brought_in_waits_to_be_counted_and_is_not_leased_again():
    units = WorkUnits(2)
    dead = one_lease(units, "dead", 0)
    units.release("dead", [consumed(dead, 2), {"1": 2}])  # of two fragments
    assert units.status() | {"leased": 3, "taken_back": 2, "lost": 2} == units.status()
    assert one_lease(units, "other", 0) == Lease(3, 2)
    units.count("dead", consumed(dead, 3))
    assert units.status() | {"trained": 3, "repeated": 0} == units.status()
    assert one_lease(units, "other", 1) == Lease(5, 5)


def test_the_same_question_has_the_same_answer():
    units = WorkUnits(3)
    first = one_lease(units, "a", 0)
    one_lease(units, "b", 0)
    assert one_lease(units, "a", 0) == first
    units.release("a")
    one_lease(units, "b", 1)
    assert one_lease(units, "a", 0) == first  # also when another has its rows by now


def test_one_answer_has_as_many_rows_as_are_asked_for_known_ones_first():
    units = WorkUnits(5)
    first = one_lease(units, "a", 0)
    assert one_lease(units, "b", 0, at_least=3) == Lease(2, 4)  # whole units
    assert leased(units, "a", 0, at_least=7) == [first, Lease(6, 6)]  # and on into the next epoch
    assert leased(units, "a", 0, at_least=7) == [first, Lease(6, 6)]
    units.release("b")
    assert leased(units, "c", 0, at_least=5) == [Lease(2, 4), Lease(12, 2)]  # what was taken back comes first


def test_a_ledger_remembers_so_many_leases_of_a_worker_and_no_more():
    units = WorkUnits(10)
    for sequence in range(KEPT_LEASES + 50):
        units.count("a", consumed(one_lease(units, "a", sequence)))
    state = units.state_dict()
    assert len(state["leases"]["a"]) == KEPT_LEASES
    assert state["trained"] == [[0, KEPT_LEASES + 50]]
    known = one_lease(units, "a", 60)
    assert known == Lease(60, 1)
    # One that comes from before that has new rows, and what it had beyond is others' to train.
    ahead = one_lease(units, "a", KEPT_LEASES + 50)
    assert one_lease(units, "a", 3).first >= ahead.first
    assert not units.has_leased("a", 60)
    assert units.status() | {"leased": 1, "repeated": 0} == units.status()


def test_a_worker_that_went_back_beyond_what_is_known_shares_no_row_with_itself():
    units = WorkUnits(10)
    lost = [one_lease(units, "a", sequence) for sequence in (7, 8)]  # a server from a backup has not heard of 0 to 6
    again = [one_lease(units, "a", sequence) for sequence in range(5, 10)]
    assert len(set(again)) == 5
    assert set(lost) <= set(again)  # taken back, so leased again first


def test_a_worker_that_is_back_in_time_has_its_rows_again():
    units = WorkUnits(2)
    units.begin("a", "run")
    lease = one_lease(units, "a", 0)
    units.release("a")
    units.begin("a", "run")
    assert one_lease(units, "b", 0).first == lease.stop
    units.count("a", consumed(lease))
    assert units.status() | {"trained": 5, "lost": 0, "repeated": 0, "taken_back": 0} == units.status()


def test_a_worker_hears_which_of_the_rows_that_it_holds_are_others():
    units = WorkUnits(5)
    units.begin("a", "run")
    mine = one_lease(units, "a", 0, at_least=6)
    question = Question.from_json(ask("a", 1, at_least=0) | {"held": [[mine.first, mine.stop]]})
    assert units.lease(question) == ([], 0, [])
    units.release("a")
    assert one_lease(units, "b", 0) == Lease(0, 2)
    units.begin("a", "run")
    assert units.lease(question) == ([], 0, [(0, 2)])
    assert units.status()["leased"] == 6


def test_another_run_of_a_name_begins_anew():
    units = WorkUnits(2)
    units.begin("a", "run")
    one_lease(units, "a", 0)
    units.begin("a", "another")
    assert one_lease(units, "a", 0) == Lease(0, 5)  # taken back from the run that is gone, and leased again first
    assert one_lease(units, "a", 1) == Lease(5, 5)
    assert units.status()["lost"] == 5


def test_rows_of_a_late_contribution_are_not_leased_again_and_repeats_are_counted():
    units = WorkUnits(2)
    evicted = one_lease(units, "evicted", 0)
    units.release("evicted")
    units.count("evicted", consumed(evicted, 2))  # came after all, before anyone else had the rows
    other = one_lease(units, "other", 0)
    assert other == Lease(2, 3)
    units.count("other", consumed(other))
    units.count("evicted", {"2": 1})  # and these rows another has trained as well
    assert units.status() | {"trained": 5, "repeated": 1, "lost": 2} == units.status()
    units.release("other")  # nothing is open, nothing comes back
    assert units.status()["taken_back"] == 0


def test_rows_that_were_trained_after_all_are_not_taken_back():
    units = WorkUnits(2)
    lease = one_lease(units, "evicted", 0)
    units.release("evicted")
    assert one_lease(units, "other", 0) == lease
    units.count("evicted", consumed(lease, 3))  # while the other is at it
    units.release("other")
    assert one_lease(units, "third", 0) == Lease(3, 2)


def test_refused_work_is_lost_and_its_rows_are_trained_by_others():
    units = WorkUnits(2)
    lease = one_lease(units, "nan", 0)
    units.refuse("nan", consumed(lease, 2))
    assert units.status() | {"lost": 2, "taken_back": 2, "leased": 3} == units.status()
    assert one_lease(units, "other", 0) == Lease(0, 2)


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

    def take(worker: str) -> None:
        at_least = data.draw(st.integers(1, 2 * rows))
        for given_ in leased(units, worker, sequences[worker], rows=rows, at_least=at_least):
            sequences[worker] += 1
            new = range(given_.first, given_.stop)
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
                take(worker)
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
        take(survivor)
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
    after = journal.answer(ask("a", 1, at_least=4))
    with (tmp_path / "leases").open("ab") as file:  # killed while it wrote the next one
        file.write(b'[4,"a","run",2,')
    again = WorkUnits(4)
    again.load_state_dict(saved)
    restarted = LeaseJournal(tmp_path / "leases", again)
    fresh = restarted.answer(ask("c", 0))
    assert before == {"leases": [[0, 2]], "lost": []}
    assert after == {"leases": [[5, 10]], "lost": []}
    assert fresh == {"leases": [[10, 12]], "lost": []}
    assert restarted.answer(ask("a", 1)) == after
    assert restarted.answer(ask("b", 0)) == between
    assert restarted.answer(ask("a", 0)) == before
    # And so says one that lost its state as well.
    empty = WorkUnits(4)
    assert LeaseJournal(tmp_path / "leases", empty).answer(ask("a", 1)) == after
    assert empty.state_dict()["leases"] == again.state_dict()["leases"]


def test_a_journal_is_written_once_an_answer(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    units = WorkUnits(10)
    journal = LeaseJournal(tmp_path / "leases", units)
    for worker in "abcabc":
        journal.answer(ask(worker, 0 if worker not in units.state_dict()["leases"] else 1))
    units.release("a"), units.release("c")
    synced.clear()
    answer = journal.answer(ask("d", 0, at_least=6))
    assert answer == {"leases": [[0, 1], [2, 4], [5, 6], [6, 8]], "lost": []}
    assert len(synced) == 1
    journal.answer(ask("d", 0, at_least=6))
    assert len(synced) == 1  # all of it is known


def test_rows_that_were_leased_again_after_the_save_are_with_one_worker_after_a_crash(tmp_path):
    units = WorkUnits(5)
    journal = LeaseJournal(tmp_path / "leases", units)
    journal.answer(ask("dead", 0))
    saved = units.state_dict()
    units.release("dead")
    assert journal.answer(ask("a", 0)) == {"leases": [[0, 2]], "lost": []}
    again = WorkUnits(5)
    again.load_state_dict(saved)
    LeaseJournal(tmp_path / "leases", again)
    again.release("dead")
    assert one_lease(again, "b", 0) == Lease(2, 2)


def test_a_lease_that_the_disk_had_no_room_for_is_told_to_nobody_until_it_is_there(tmp_path, monkeypatch):
    units = WorkUnits(5)
    journal = LeaseJournal(tmp_path / "leases", units)
    first = journal.answer(ask("a", 0))

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                journal.answer(ask("a", 1))
    second = journal.answer(ask("a", 1))
    empty = WorkUnits(5)
    restarted = LeaseJournal(tmp_path / "leases", empty)
    assert [restarted.answer(ask("a", sequence)) for sequence in (0, 1)] == [first, second]


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
    empty = WorkUnits(4)
    LeaseJournal(tmp_path / "leases", empty)
    assert empty.state_dict()["leases"] == again.state_dict()["leases"]


def test_another_order_is_refused_and_the_difference_named():
    units = WorkUnits(3)
    one_lease(units, "a", 0)
    with pytest.raises(
        ProtocolError, match=r"seed 0 with 10 rows an epoch; this worker has .*seed 1 with 10"
    ) as caught:
        one_lease(units, "b", 0, order="permutation of 10 blocks, seed 1")
    assert caught.value.status == 422
    assert "--no-diloco-leased" in caught.value.fix
    with pytest.raises(ProtocolError, match="12 rows"):
        one_lease(units, "b", 0, rows=12)
    assert units.status()["leased"] == 3


@pytest.mark.parametrize(
    "request_",
    [
        {},
        [],
        None,
        ask("", 0),
        ask("a", -1),
        ask("a", 0, rows=0),
        ask("a", 0) | {"sequence": "0"},
        ask("a", 0, at_least=-1),
        ask("a", 0, at_least=2**62),
        ask("a", 0) | {"held": None},
        ask("a", 0) | {"held": [[1, 1]]},
        ask("a", 0) | {"held": [[1, "2"]]},
        ask("a", 0) | {"held": [[1, 2]] * 70_000},
    ],
)
def test_what_is_no_request_is_refused(request_):
    with pytest.raises(ProtocolError):
        Question.from_json(request_)


@pytest.mark.parametrize("wrong", [{"x": 1}, {"-1": 1}, {"0": 0}, {"0": 2**62}, {"9" * 30: 1}, {"\u0663": 1}])
def test_what_cannot_be_counted_is_refused(wrong):
    with pytest.raises(ProtocolError):
        require_leased(wrong, 2**70)


def test_rows_that_nobody_was_leased_are_refused_and_what_was_leased_once_is_not():
    units = WorkUnits(3)
    assert units.stop == 0
    units.lease(Question.from_json(ask("a", 0, at_least=2)))
    units.release("a")
    require_leased({"0": units.stop}, units.stop)
    for wrong in ({"0": units.stop + 1}, {"0": 2**61}, {str(units.stop): 1}):
        with pytest.raises(ProtocolError, match="were leased"):
            require_leased(wrong, units.stop)
    with pytest.raises(ProtocolError, match="ranges"):
        require_leased({str(row): 1 for row in range(70_000)}, 2**62)


def test_the_number_of_units_stays():
    with pytest.raises(ConfigError, match="0 units"):
        WorkUnits(0)
    with pytest.raises(ConfigError, match="has 3 work units an epoch, not 4"):
        WorkUnits(4).load_state_dict(WorkUnits(3).state_dict())
