"""How the processes of a run are arranged: `replicate` groups, each of `shard` processes that share one model.

Both axes read different data: a batch is spread over all `replicate x shard` ranks.
"""

from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from forgather.distributed.environment import Environment
from forgather.errors import DistributedError

Size = int | Literal["auto"]


class Mesh:
    """The axes of a run over the processes there are; one axis may be `auto`: what the others leave.

    `device_mesh` is None for a world of one, else a DeviceMesh `(shard,)`, or `(replicate, shard)` with replicas.
    Raises DistributedError when the axes do not multiply to the number of processes.
    """

    def __init__(self, environment: Environment, replicate: Size = 1, shard: Size = "auto") -> None:
        self.environment = environment
        self.replicate, self.shard = _resolve(environment.world_size, replicate, shard)
        self.device_mesh = self._build_device_mesh()

    @property
    def data_rank(self) -> int:
        """Which part of a global batch this rank reads: 0 to data_ranks - 1."""
        return self.environment.rank

    @property
    def data_ranks(self) -> int:
        """Into how many parts a global batch is cut."""
        return self.replicate * self.shard

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The process group over which losses and token counts are summed; None is the default group."""
        return None

    def describe(self) -> str:
        return f"replicate {self.replicate} x shard {self.shard}: {self.environment.describe()}"

    def _build_device_mesh(self) -> DeviceMesh | None:
        if self.environment.world_size == 1:
            return None
        device = self.environment.device.type
        if self.replicate == 1:
            return init_device_mesh(device, (self.shard,), mesh_dim_names=("shard",))
        return init_device_mesh(device, (self.replicate, self.shard), mesh_dim_names=("replicate", "shard"))


def _resolve(world_size: int, replicate: Size, shard: Size) -> tuple[int, int]:
    for name, size in (("replicate", replicate), ("shard", shard)):
        if size != "auto" and (not isinstance(size, int) or size < 1):
            raise DistributedError(f"mesh.{name} is {size!r}", fix="use a whole number from 1, or auto")
    if replicate == "auto" and shard == "auto":
        raise DistributedError("mesh.replicate and mesh.shard are both auto", fix="give one of them a number")
    if replicate == "auto":
        assert shard != "auto"
        replicate = max(1, world_size // shard)
    elif shard == "auto":
        shard = max(1, world_size // replicate)
    assert replicate != "auto"
    assert shard != "auto"
    if replicate * shard != world_size:
        pairs = [(n, world_size // n) for n in range(1, world_size + 1) if world_size % n == 0]
        raise DistributedError(
            f"mesh replicate {replicate} x shard {shard} does not make {world_size} processes",
            fix="use " + " or ".join(f"replicate {left} x shard {right}" for left, right in pairs),
        )
    return replicate, shard
