"""Which of the ranks that hold the same parameter counts it, in a norm or a number of parameters."""

from torch import Tensor
from torch.distributed.tensor import DTensor

from forgather.distributed.mesh import Mesh

_ELSEWHERE = "_forgather_counted_elsewhere"


def counts_here(parameter: Tensor, mesh: Mesh) -> bool:
    """Whether this rank is the one of all that hold the elements of its part of `parameter` that counts them.

    Along every axis on which ranks have equal parts it is the first. Stages of a pipeline have different parameters; of
    one that is tied across stages all but one holder are marked.
    """
    if hasattr(parameter, _ELSEWHERE):
        return False
    cut = set()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names
        assert names is not None, "the axes of a run's mesh have names"
        cut = {name for name, place in zip(names, parameter.placements, strict=True) if place.is_shard()}
    return all(mesh.coordinate(axis) == 0 for axis in ("replicate", "shard", "tensor") if axis not in cut)


def mark_counted_elsewhere(parameter: Tensor) -> None:
    """Let another rank count `parameter`: it is tied to one there."""
    setattr(parameter, _ELSEWHERE, True)
