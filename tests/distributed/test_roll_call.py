"""A collective that waits in vain says which rank is missing, and where that rank is; waiting times fit together."""

import os
import signal
import time
from datetime import timedelta

import pytest

from forgather.distributed import roll_call
from forgather.distributed.failure import Failure
from forgather.distributed.timeouts import check_collective_timeout, check_timeouts
from forgather.errors import DistributedError
from tests.ranks import RankPool

FITTING = {"keep_alive_interval": 2, "keep_alive_max_attempt": 3, "last_call_timeout": 5, "join_timeout": 900}


@pytest.mark.parametrize(
    ("changed", "collective_s", "message"),
    [
        ({"keep_alive_interval": 1, "keep_alive_max_attempt": 2}, 60, "a host counts as lost after 2 s"),
        ({"join_timeout": 10}, 1, "it takes 6 s to notice that one is lost"),
        ({"last_call_timeout": 1000}, 60, r"1000 s more to begin without it \(last_call_timeout\)"),
        ({}, 900, r"may wait 900 s in a collective \(collective_timeout_s\)"),
    ],
)
def test_waiting_times_that_cannot_work_together_are_refused(changed, collective_s, message):
    check_timeouts(FITTING, 600)
    with pytest.raises(DistributedError, match=message) as error:
        check_timeouts(FITTING | changed, collective_s)
    assert error.value.fix


def test_what_is_advised_for_times_works():
    with pytest.raises(DistributedError) as error:
        check_timeouts(FITTING, 2000)
    advised = int(error.value.fix.rpartition("join_timeout=")[2])
    check_timeouts(FITTING | {"join_timeout": advised}, 2000)


def test_a_collective_timeout_has_time_to_find_who_is_missing():
    with pytest.raises(DistributedError, match="collective_timeout_s is 3"):
        check_collective_timeout(3, roll_call.ANSWER_S)


def test_only_timeouts_of_collectives_are_explained():
    assert roll_call.explain(ValueError("Timed out waiting")) is None
    assert roll_call.explain(RuntimeError("Timed out waiting")) is None, "it was no collective"
    assert roll_call.explain(RuntimeError("boom")) is None


@pytest.mark.parametrize(
    "said",
    [
        "Connection closed by peer [10.0.0.2]:38319. This is typically",
        "Read error [10.0.0.2]:38319: Connection reset by peer",
    ],
)
def test_a_peer_that_has_gone_is_told_in_our_words(said, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    failure = Failure.of(RuntimeError(f"[/gloo/gloo/transport/tcp/pair.cc:553] {said}"))
    assert failure.message == "the connection to a rank on 10.0.0.2 was lost: its process or host is gone"
    assert Failure.of(RuntimeError("boom")).message == "RuntimeError: boom"


def _meet(where):
    """All ranks but 1 wait for it in an all_reduce of a group that times out after a second."""
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    rank = dist.get_rank()
    group = dist.new_group(timeout=timedelta(seconds=1.0))
    dist.barrier()
    roll = roll_call.RollCall(distributed_c10d._get_default_store().clone(), rank, dist.get_world_size(), 1.0)
    roll.start()
    try:
        if rank != 1:
            dist.all_reduce(torch.zeros(1), group=group)
        elif where == "asleep":
            time.sleep(6)
        else:
            pid = os.fork()
            if pid == 0:
                time.sleep(7)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
    except RuntimeError as error:
        return roll_call.explain(error)
    finally:
        roll.close()
    return None


@pytest.mark.parametrize("where", ["asleep", "stopped"])
def test_the_missing_rank_is_named(where):
    with RankPool(2) as pool:
        said, _ = pool.run(_meet, where)
    assert said.startswith("all_reduce timed out after 1 s, called at ")
    assert f"test_roll_call.py:{_meet.__code__.co_firstlineno + 13}, _meet: dist.all_reduce(" in said
    if where == "asleep":
        assert said.endswith("_meet: time.sleep(6)")
        assert "; rank 1 is at " in said
    else:
        assert said.endswith("; rank 1 does not answer: stopped, or the host is gone")
