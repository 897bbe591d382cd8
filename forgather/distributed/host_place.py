"""Which of a run's hosts this process is on, and which of that host's processes it is, as torchrun has told it.

Without torchrun all processes are taken to be on one host.
"""

import os
from dataclasses import dataclass

from forgather.distributed.collectives import rank, world_size


@dataclass(frozen=True)
class HostPlace:
    """`host` of `num_hosts`, and there process `local_rank` of `local_size`."""

    host: int
    num_hosts: int
    local_rank: int
    local_size: int


def host_place() -> HostPlace:
    """This process's; no communication."""
    num_hosts = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if num_hosts == 1 or world_size() == 1:
        return HostPlace(0, 1, rank(), world_size())
    variables = ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    host, local_rank, local_size = (int(os.environ[name]) for name in variables)
    return HostPlace(host, num_hosts, local_rank, local_size)
