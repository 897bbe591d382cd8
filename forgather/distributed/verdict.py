"""Which of the failures that a run's ranks and hosts saw is the one that the others follow from.

When one rank fails, its peers fail too: their connections are lost. What a user can mend comes before a rank that was
killed, a killed rank before internal errors, and within these the earliest comes first.
"""

import json
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch.distributed import DistError, Store  # type: ignore[attr-defined]  # not listed in its __all__

from forgather.distributed.failure import Failure
from forgather.errors import EXIT_INTERNAL

_SHARE_S = 1.0  # how long the hosts wait for one another's accounts; a host that is lost gives none

_MEMORY = "if nobody killed it, memory ran out: `dmesg` says so; use fewer rows per forward or fewer data workers"


def first_failure(records: Sequence[Failure], killed: Mapping[int, int], world_size: int) -> Failure | None:
    """The first failure on this host; `killed` maps ranks that a signal ended to its number.

    A rank that is killed leaves no record.
    """
    silent = {rank: number for rank, number in killed.items() if all(record.rank != rank for record in records)}
    lost = [_killed(rank, silent[rank], world_size, records) for rank in sorted(silent)]
    return min([*records, *lost[:1]], key=_order, default=None)


def first_of_hosts(own: Failure | None, store: Store, host: int, num_hosts: int, attempt: int) -> Failure | None:
    """The first failure on any host. Each host's launcher calls it; those that do not within a second are left out."""
    keys = [f"forgather/failure/{attempt}/{number}" for number in range(num_hosts)]
    try:
        store.set(keys[host], json.dumps(None if own is None else asdict(own)))
        end = time.monotonic() + _SHARE_S
        while not store.check(keys) and time.monotonic() < end:
            time.sleep(0.02)
        accounts = [json.loads(store.get(key)) for key in keys if store.check([key])]
    except DistError:  # the host that keeps the store is gone
        return own
    return min((Failure(**account) for account in accounts if account is not None), key=_order, default=None)


def _order(failure: Failure) -> tuple[int, float]:
    if failure.exit_code != EXIT_INTERNAL:
        return (0, failure.time)
    return (1 if failure.traceback is None else 2, failure.time)


def _killed(rank: int, number: int, world_size: int, records: Sequence[Failure]) -> Failure:
    name = signal.Signals(number).name
    logs = [Path(record.log).with_name(f"rank-{rank}.log") for record in records if record.log is not None]
    collective = _timed_out(logs[0]) if number == signal.SIGABRT and logs else None
    return Failure(
        rank=rank,
        world_size=world_size,
        host=socket.gethostname(),
        time=time.time(),
        message=f"killed by {name}" if collective is None else f"a collective timed out: {collective}",
        fix=_MEMORY if number == signal.SIGKILL else None,
        traceback=None,
        exit_code=EXIT_INTERNAL,
        log=str(logs[0]) if logs else None,
    )


def _timed_out(log: Path) -> str | None:
    """What NCCL's watchdog wrote before it ended its process: the operation that did not finish."""
    if not log.is_file():
        return None
    for line in reversed(log.read_text(errors="replace").splitlines()[-2000:]):
        if "Watchdog caught collective operation timeout" in line:
            return line.partition("timeout: ")[2]
    return None
