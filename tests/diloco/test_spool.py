"""Room for contributions: memory up to a budget, files beyond, and nothing left of what was given back."""

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from forgather.diloco.spool import Room, Spool, refusal

MIB = 1 << 20


@pytest.fixture
def submit():
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def taken(room: Room) -> Room:
    if (taking := room.take()) is not None:
        taking.result(10)
    return room


def put(room: Room, data: bytes, step: int = 100_000) -> None:
    taken(room)
    for start in range(0, len(data), step):
        written = room.write(memoryview(data)[start : start + step])
        if written is not None:
            written.result(10)
    if (written := room.finish()) is not None:
        written.result(10)


@pytest.mark.parametrize("memory_bytes", [64 * MIB, 0, 4 * MIB + 5], ids=["memory", "file", "both"])
def test_what_is_written_in_pieces_is_there_at_any_place(
    tmp_path: Path, submit: Callable[..., "Future[None]"], memory_bytes: int
) -> None:
    spool = Spool(tmp_path, memory_bytes, submit)
    data = os.urandom(7 * MIB + 17)
    room = spool.room(len(data))
    assert spool.memory_used == min(memory_bytes, len(data))
    put(room, data)
    assert room.num_readable == len(data)
    for start, length in ((0, len(data)), (1, 100), (4 * MIB - 3, MIB), (5 * MIB, MIB), (len(data), 0)):
        assert bytes(room.view(start, length).numpy()) == data[start : start + length]
    room.forget(4096, 2 * MIB)
    assert bytes(room.view(4097, 50).numpy()) == data[4097:4147]  # it was only put out of memory
    room.release()


def test_the_budget_is_kept_and_what_is_given_back_is_given_again(
    tmp_path: Path, submit: Callable[..., "Future[None]"]
) -> None:
    spool = Spool(tmp_path, 8 * MIB + 5, submit)
    rooms = [spool.room(4 * MIB) for _ in range(4)]
    assert (spool.memory_used, spool.disk_used) == (8 * MIB, 8 * MIB)
    rooms[0].release()
    rooms[0].release()  # twice is once
    rooms.append(spool.room(4 * MIB))
    assert (spool.memory_used, spool.disk_used) == (8 * MIB, 8 * MIB)
    for room in rooms:
        room.release()
    assert (spool.memory_used, spool.disk_used) == (0, 0)


def test_files_have_no_names_so_that_nothing_is_left_of_a_server_that_was_killed(
    tmp_path: Path, submit: Callable[..., "Future[None]"]
) -> None:
    room = Spool(tmp_path, 0, submit).room(MIB)
    put(room, bytes(MIB))
    assert list(tmp_path.iterdir()) == []
    room.release()


def test_a_view_stays_good_when_its_room_is_given_back(tmp_path: Path, submit: Callable[..., "Future[None]"]) -> None:
    for memory_bytes in (MIB, 0):
        room = Spool(tmp_path, memory_bytes, submit).room(1000)
        put(room, b"x" * 1000)
        view = room.view(0, 1000)
        room.release()
        assert torch.all(view == ord("x"))


def test_a_file_is_not_closed_under_a_thread_that_writes_to_it(tmp_path: Path) -> None:
    """Its number might be another file's by then."""
    waiting: list[Callable[[], None]] = []
    futures: list[Future[None]] = []

    def submit(write: Callable[[], None]) -> "Future[None]":
        waiting.append(write)
        futures.append(Future())
        return futures[-1]

    room = Spool(tmp_path, 0, submit).room(2 * MIB)
    assert room.take() is futures[0]
    waiting[0]()
    futures[0].set_result(None)
    room.write(memoryview(bytes(2 * MIB)))
    assert room.finish() is futures[1]
    assert room.num_readable == 0
    room.release()
    waiting[1]()
    futures[1].set_result(None)
    with pytest.raises(ValueError, match="closed file"):
        waiting[1]()


def test_what_is_written_out_of_order_can_be_looked_at_when_all_before_it_is_there(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        writes: list[Callable[[], None]] = []
        futures: list[Future[None]] = []

        def submit(write: Callable[[], None]) -> "Future[None]":
            writes.append(write)
            futures.append(Future())
            return futures[-1]

        room = Spool(tmp_path, 0, submit).room(2 * MIB)
        room.take()
        writes.pop()()
        futures.pop().set_result(None)
        for _ in range(2):
            room.write(memoryview(bytes(MIB)))
        second = pool.submit(writes[1])
        with pytest.raises(TimeoutError):
            second.result(0.05)
        assert room.num_readable == 0
        writes[0]()
        futures[0].set_result(None)
        second.result(10)
        assert room.num_readable == 2 * MIB
        futures[1].set_result(None)
        room.release()


def test_a_full_disk_is_told_before_anything_is_read(
    tmp_path: Path, submit: Callable[..., "Future[None]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    spool = Spool(tmp_path, 0, submit)
    room = spool.room(MIB)
    with pytest.raises(OSError, match="No space") as told:
        taken(room)
    assert refusal(tmp_path, told.value).status == 507
    room.release()
    assert spool.disk_used == 0


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_that_a_thread_is_still_making_is_closed_when_it_is_there(tmp_path: Path) -> None:
    waiting: list[Callable[[], None]] = []
    made: Future[None] = Future()

    def submit(make: Callable[[], None]) -> "Future[None]":
        waiting.append(make)
        return made

    room = Spool(tmp_path, 0, submit).room(MIB)
    room.take()
    before = num_open_files()
    room.release()  # whoever sent it has gone
    waiting[0]()
    assert num_open_files() == before + 1
    made.set_result(None)
    assert num_open_files() == before


def test_memory_that_was_given_back_serves_again_unless_somebody_looks_at_it(
    tmp_path: Path, submit: Callable[..., "Future[None]"]
) -> None:
    spool = Spool(tmp_path, 8 * MIB, submit)
    room = spool.room(4 * MIB)
    put(room, b"a" * (4 * MIB))
    address = room.view(0, 1).data_ptr()
    room.release()
    again = spool.room(4 * MIB)
    put(again, b"b" * (4 * MIB))
    seen = again.view(0, 4 * MIB)
    assert seen.data_ptr() == address
    again.release()
    third = spool.room(4 * MIB)  # what was seen stays good
    put(third, b"c" * (4 * MIB))
    assert third.view(0, 1).data_ptr() != address
    assert bool((seen == ord("b")).all())
    # Of another size there is none, and what was spare goes, so that the budget holds.
    third.release()
    spool.room(5 * MIB)
    assert spool.memory_used == 5 * MIB
    assert not spool._spare
