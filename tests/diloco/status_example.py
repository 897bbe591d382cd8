"""What a server of two fragments says of itself in the middle of a run; plain data, as it comes over the wire."""

import copy
from typing import Any


def example() -> dict[str, Any]:
    """A copy, to be changed at will."""
    return copy.deepcopy(_EXAMPLE)


def worker(**changes: Any) -> dict[str, Any]:
    """One worker's part of it."""
    return {
        "host": "box1",
        "mesh": "shard 2",
        "state": "live",
        "last_heartbeat_s": 1.25,
        "steps": 1200,
        "steps_per_s": 2.5,
        "tokens_per_s": 10240.0,
        "loss": 3.14159,
        "counted": 4,
        "bytes_up": 120_000_000,
        "bytes_down": 130_000_000,
        "sync_every": 500,
        **changes,
    }


def closed(number: int, **changes: Any) -> dict[str, Any]:
    """The `number`-th round that was closed."""
    return {
        "fragment": number % 2,
        "version": number // 2 + 1,
        "workers": ["box1", "box2"],
        "tokens": 4_096_000,
        "norm": 1.0 / (number + 1),
        "seconds": 61.5 + number % 3,
        "loss": 4.0 + 6.0 / (number + 1),
        "time": 1_790_000_000.0 + 60 * number,
        **changes,
    }


_EXAMPLE: dict[str, Any] = {
    "mode": "sync",
    "state": "training",
    "versions": [5, 4],
    "durable": [4, 4],
    "num_workers": 2,
    "num_awaited": 0,
    "min_workers": 1,
    "round_timeout_s": 600.0,
    "workers": {
        "box1": worker(),
        "box2": worker(
            host="box2", state="dead", last_heartbeat_s=95.0, loss=None, steps_per_s=None, tokens_per_s=None
        ),
    },
    "held": [{"fragment": 1, "round": 4, "workers": ["box1"], "expected": ["box1", "box2"], "open_s": 12.0}],
    "outer": "SGD lr 0.7, Nesterov momentum 0.9",
    "model": {"parameters": 30_000_000, "bytes": 120_000_000},
    "uptime_s": 7830.0,
    "bytes_up": 240_000_000,
    "bytes_down": 260_000_000,
    "refused": 1,
    "history": [closed(number) for number in range(9)],
    "ledger": {
        "units": 64,
        "rows": 9000,
        "epoch": 0.91,
        "leased": 32,
        "trained": 8192,
        "repeated": 16,
        "taken_back": 0,
    },
}
