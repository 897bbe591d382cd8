"""How the processes of a run are arranged: a grid of up to four axes.

    replicate   copies of the model (or of its stages), each fed other rows; gradients are summed over them
    shard       ranks that keep the parameters of one copy in pieces (FSDP), each fed other rows
    pipeline    stages, one after the other: each rank has some of the layers, and all of them see the same rows
    tensor      ranks that split every matrix of a layer among them, and see the same rows

A batch is cut over `replicate x shard`. Neighbouring ranks differ in `tensor`, which talks most, and the farthest in
`pipeline`, which talks least: the axes are laid over the ranks as (pipeline, replicate, shard, tensor).
"""

from collections.abc import Mapping
from math import prod
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from forgather.distributed.environment import Environment
from forgather.errors import DistributedError

Size = int | Literal["auto"]
AXES = ("pipeline", "replicate", "shard", "tensor")  # from the slowest network to the fastest


class Mesh:
    """The axes of a run over the processes there are; one axis may be `auto`: what the others leave.

    `device_mesh` has the axes longer than 1, in the order of `AXES`, and is None for a world of one. Its parts are None
    where they would hold this rank alone: `pipeline_mesh`, `tensor_mesh`, and `data_mesh`, which is `(shard,)`, or
    `(replicate, shard)` with replicas. Raises DistributedError when the axes do not multiply to the processes.
    """

    def __init__(
        self,
        environment: Environment,
        replicate: Size = 1,
        shard: Size = "auto",
        pipeline: Size = 1,
        tensor: Size = 1,
    ) -> None:
        self.environment = environment
        asked = {"pipeline": pipeline, "replicate": replicate, "shard": shard, "tensor": tensor}
        self.sizes = _resolve(environment.world_size, asked)
        self.device_mesh = self._build_device_mesh()
        self.data_mesh = self._part("replicate", "shard")
        self.pipeline_mesh = self._part("pipeline")
        self.tensor_mesh = self._part("tensor")
        self.data_group = self._build_data_group()

    @property
    def replicate(self) -> int:
        return self.sizes["replicate"]

    @property
    def shard(self) -> int:
        return self.sizes["shard"]

    @property
    def pipeline(self) -> int:
        return self.sizes["pipeline"]

    @property
    def tensor(self) -> int:
        return self.sizes["tensor"]

    def coordinate(self, axis: str) -> int:
        """Where this rank stands on `axis`: 0 to its size - 1."""
        position = AXES.index(axis)
        return self.environment.rank // prod(self.sizes[inner] for inner in AXES[position + 1 :]) % self.sizes[axis]

    @property
    def data_rank(self) -> int:
        """Which part of a global batch this rank reads: 0 to data_ranks - 1."""
        return self.coordinate("replicate") * self.shard + self.coordinate("shard")

    @property
    def data_ranks(self) -> int:
        """Into how many parts a global batch is cut."""
        return self.replicate * self.shard

    def describe(self) -> str:
        # The two axes that every run has; the others where they are used.
        shown = [axis for axis in AXES if self.sizes[axis] > 1 or axis in ("replicate", "shard")]
        return f"{_words({axis: self.sizes[axis] for axis in shown})}: {self.environment.describe()}"

    def _build_device_mesh(self) -> DeviceMesh | None:
        if self.environment.world_size == 1:
            return None
        axes = [axis for axis in AXES if self._has(axis)]
        return init_device_mesh(
            self.environment.device.type, tuple(self.sizes[axis] for axis in axes), mesh_dim_names=tuple(axes)
        )

    def _has(self, axis: str) -> bool:
        # fully_shard knows replicas only as the outer axis of two.
        return self.sizes[axis] > 1 or (axis == "shard" and self.replicate > 1)

    def _part(self, *axes: str) -> DeviceMesh | None:
        present = tuple(axis for axis in axes if self._has(axis))
        return self.device_mesh[present] if self.device_mesh is not None and present else None

    def _build_data_group(self) -> dist.ProcessGroup | None:
        """The group over which losses and token counts of different rows are summed.

        None is the group of all ranks, where each reads other rows, and also that of a world of one. A group of this
        rank alone is made where the batch is not cut at all.
        """
        if self.device_mesh is None or self.data_ranks == self.environment.world_size:
            return None
        if self.data_mesh is None:
            alone, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]
            assert isinstance(alone, dist.ProcessGroup)
            return alone
        if self.data_mesh.ndim == 1:
            return self.data_mesh.get_group()
        return self.data_mesh._flatten("data").get_group()


def _resolve(world_size: int, asked: Mapping[str, Size]) -> dict[str, int]:
    for axis, size in asked.items():
        if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise DistributedError(f"mesh.{axis} is {size!r}", fix="use a whole number from 1, or auto")
    open_axes = [axis for axis, size in asked.items() if size == "auto"]
    if len(open_axes) > 1:
        raise DistributedError(
            f"mesh.{' and mesh.'.join(open_axes)} are {'both' if len(open_axes) == 2 else 'all'} auto",
            fix=f"give {'one' if len(open_axes) == 2 else 'all but one'} of them a number",
        )
    given = {axis: size for axis, size in asked.items() if size != "auto"}
    taken = prod(given.values())
    sizes = {axis: given.get(axis, max(1, world_size // taken)) for axis in asked}
    if prod(sizes.values()) == world_size:
        return sizes
    told = _words({axis: size for axis, size in sizes.items() if size > 1 or axis in ("replicate", "shard")})
    raise DistributedError(
        f"mesh {told} takes {prod(sizes.values())} processes, and there are {world_size}",
        fix=f"start {prod(sizes.values())} (--nproc {prod(sizes.values())} on one host), or {_fix(world_size, sizes)}",
    )


def _fix(world_size: int, sizes: Mapping[str, int]) -> str:
    """Which numbers of processes the layers' axes leave, or which pairs of the data's axes."""
    model = sizes["pipeline"] * sizes["tensor"]
    if world_size % model:
        parts = _words({axis: sizes[axis] for axis in ("pipeline", "tensor") if sizes[axis] > 1})
        return f"start a multiple of {model} processes ({parts}), or lower these"
    data = world_size // model
    pairs = [(count, data // count) for count in range(1, data + 1) if data % count == 0]
    return "use " + " or ".join(f"replicate {left} x shard {right}" for left, right in pairs)


def _words(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())
