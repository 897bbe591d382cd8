"""A payload is sent while it is made, whole and in order, and what keeps it from being made is raised to who waits."""

import threading

import pytest
import torch
import xxhash

from forgather.checkpoint.storage import raw_bytes
from forgather.diloco.payload import Payload


def drawn(num_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_bytes_are_sent_as_they_come_and_the_digest_is_of_all() -> None:
    data = drawn(5 << 20)
    payload = Payload(torch.zeros_like(data))
    is_taken = threading.Semaphore(0)

    def write() -> None:
        with payload.written():
            for start in range(0, len(data), 3 << 20):
                part = data[start : start + (3 << 20)]
                payload.data[start : start + len(part)] = part
                payload.grow(len(part))
                assert is_taken.acquire(timeout=10)

    thread = threading.Thread(target=write)
    thread.start()
    sent = bytearray()
    for block in payload.blocks():
        sent += block
        if len(sent) in (3 << 20, 5 << 20):  # all that is there: more comes only after it was taken
            is_taken.release()
    thread.join(10)
    assert sent == bytes(raw_bytes(data))
    assert payload.is_whole
    assert payload.digest == Payload.whole(data).digest == xxhash.xxh3_64(bytes(raw_bytes(data))).digest()


def test_what_keeps_it_from_being_made_is_raised_to_whoever_waits() -> None:
    payload = Payload(drawn(100))
    with payload.written():
        payload.grow(60)
        raise MemoryError("no room for a piece")
    blocks = payload.blocks()
    assert len(next(blocks)) == 60
    with pytest.raises(MemoryError, match="no room"):
        next(blocks)
    with pytest.raises(MemoryError, match="no room"):
        payload.wait()


def test_one_without_bytes_is_whole() -> None:
    payload = Payload(drawn(0))
    payload.wait()
    assert list(payload.blocks()) == []
    assert payload.digest == xxhash.xxh3_64().digest()
