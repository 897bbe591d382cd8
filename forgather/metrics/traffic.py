"""Bytes that a rank sends to others, counted where torch hands them to the network.

    with Traffic() as traffic:
        step(batches)
    traffic.bytes_sent            # of this rank
    traffic.by_collective         # {"all_gather": 1048576, "reduce_scatter": 524288, ...}

Each collective passes torch's dispatcher, whether FSDP, DDP, a tensor-parallel layer, a pipeline schedule or our own
code asks for it, so none is forgotten. Counted is what the ring algorithm sends, which no algorithm undercuts for large
tensors (Patarasuk and Yuan, 2009): of S bytes on each of n ranks an all-reduce sends 2 (n - 1) / n S, a reduce-scatter
(n - 1) / n S, an all-gather of S bytes a rank (n - 1) S. Libraries choose other algorithms for small tensors.

Counting sees every operation and costs microseconds for each, so the meter does it for one step, not for all.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The part of the bytes given to a collective of n ranks that each of them sends: inputs of all-gathers, and so on.
_SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: float(n > 1),
    "reduce": lambda n: float(n > 1),
    "gather": lambda n: float(n > 1),
    "scatter": lambda n: float(n > 1),
    "send": lambda n: float(n > 1),
}

# Operations of torch's two families of collectives: which one it is, and which argument holds what is sent.
_OPERATIONS: dict[str, tuple[str, str]] = {
    "c10d::allreduce_": ("all_reduce", "tensors"),
    "c10d::allreduce_coalesced_": ("all_reduce", "tensors"),
    "c10d::_allgather_base_": ("all_gather", "input_tensor"),
    "c10d::allgather_": ("all_gather", "input_tensors"),
    "c10d::allgather_coalesced_": ("all_gather", "input_list"),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", "inputs"),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "c10d::reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "c10d::alltoall_": ("all_to_all", "input_tensors"),
    "c10d::alltoall_base_": ("all_to_all", "input"),
    "c10d::broadcast_": ("broadcast", "tensors"),
    "c10d::reduce_": ("reduce", "tensors"),
    "c10d::gather_": ("gather", "input_tensors"),
    "c10d::scatter_": ("scatter", "input_tensors"),
    "c10d::send": ("send", "tensors"),
    "_c10d_functional::all_reduce": ("all_reduce", "input"),
    "_c10d_functional::all_reduce_": ("all_reduce", "input"),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", "inputs"),
    "_c10d_functional::all_reduce_coalesced_": ("all_reduce", "inputs"),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "input"),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", "input"),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", "inputs"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce_scatter", "input"),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs"),
    "_c10d_functional::all_to_all_single": ("all_to_all", "input"),
    "_c10d_functional::broadcast": ("broadcast", "input"),
    "_c10d_functional::broadcast_": ("broadcast", "input"),
}


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what this rank sends in the collectives and messages that are begun inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sent: defaultdict[str, float] = defaultdict(float)
        self._calls: Counter[str] = Counter()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # it changes nothing: torch.compile runs what it has compiled

    @property
    def bytes_sent(self) -> int:
        return sum(self.by_collective.values())

    @property
    def by_collective(self) -> dict[str, int]:
        return {name: round(size) for name, size in sorted(self._sent.items())}

    @property
    def calls(self) -> dict[str, int]:
        """How often each collective was begun."""
        return dict(sorted(self._calls.items()))

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Most operations are none of ours: only the name's first letters are looked at.
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func, args, kwargs)
        return func(*args, **kwargs)

    def _count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        found = _OPERATIONS.get(func._schema.name)
        if found is None:
            return
        collective, argument = found
        given = dict(zip((part.name for part in func._schema.arguments), args, strict=False)) | dict(kwargs)
        tensors = [leaf for leaf in tree_leaves(given[argument]) if isinstance(leaf, torch.Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._sent[collective] += size * _SENT[collective](_group_size(given))
        self._calls[collective] += 1


def _group_size(given: Mapping[str, Any]) -> int:
    group = given["process_group"] if "process_group" in given else given["group_name"]
    if isinstance(group, str):
        group = _resolve_process_group(GroupName(group))
    if isinstance(group, torch.ScriptObject):
        group = dist.ProcessGroup.unbox(group)
    return int(group.size())
