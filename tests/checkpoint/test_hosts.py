"""Hosts may have other bytes of one checkpoint, in their caches or as copies: each verifies those that it uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from forgather.checkpoint import storage
from forgather.checkpoint.loading import Checkpoint, load_checkpoint, visible_checkpoint
from forgather.checkpoint.storage import read_all
from forgather.distributed.collectives import rank
from tests.checkpoint.training import Run, save_at
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def damage_seen(folder: str, altered_rank: int) -> dict[str, list[str]]:
    """Of two ranks on two hosts: what both see of a weight whose last byte is another on one of them."""
    os.environ.update(GROUP_RANK=str(rank()), GROUP_WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    checkpoint = visible_checkpoint(Path(folder) / "checkpoints" / "step-00000001")
    assert isinstance(checkpoint, Checkpoint)
    run = Run(seed=7)
    bad = -1

    def read(descriptor: int, data: memoryview, at: int) -> int:
        count = read_all(descriptor, data, at)
        if rank() == altered_rank and at <= bad < at + count:
            data[bad - at] ^= 1
        return count

    storage.read_all = read
    seen = {}
    try:
        for name, stored in checkpoint.layout.items():
            if name.startswith("model/"):
                (chunk,) = stored.chunks
                bad = chunk.at + chunk.length - 1
                seen[name] = load_checkpoint(run.state, checkpoint)
        bad = -1
        assert load_checkpoint(run.state, checkpoint) == []
    finally:
        storage.read_all = read_all
        for variable in ("GROUP_RANK", "GROUP_WORLD_SIZE"):
            del os.environ[variable]
        os.environ.update(LOCAL_RANK=str(rank()), LOCAL_WORLD_SIZE="2")
    return seen


@pytest.mark.parametrize("altered_rank", [0, 1])
def test_each_host_verifies_what_it_reads(tmp_path: Path, two_ranks: RankPool, altered_rank: int) -> None:
    """One rank has saved, so that each of two reads a part of all, and neither would notice damage by itself."""
    save_at(str(tmp_path), 1)
    first, second = two_ranks.run(damage_seen, str(tmp_path), altered_rank)
    assert first == second
    assert len(first) > 10
    for name, damage in first.items():
        assert len(damage) == 1, name
        assert f"was altered where {name} is stored" in damage[0]
