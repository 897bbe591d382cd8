"""The place of this process among its peers: rank, device, process group.

A process started by torchrun (`RANK` is set) joins its group; any other is a world of one and needs no group, no port
and no environment variable.
"""

import hashlib
import os
import random
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from forgather.distributed.failure import explain_with
from forgather.distributed.network import Interface, use_interface
from forgather.distributed.roll_call import ANSWER_S, RollCall, explain
from forgather.distributed.timeouts import check_collective_timeout
from forgather.errors import DistributedError

# The threads ask for the interpreter within microseconds and get it as soon as the main thread sleeps.
GLOO_DROPS_S = 0.02


class Environment:
    """This process's rank, world and device; joins the process group that torchrun describes.

    `device` is `auto` (CUDA where there is one, else the CPU), `cpu` or `cuda`, where each local rank takes its own.
    `threads` sets the number of threads of one operation on the CPU; null keeps what `OMP_NUM_THREADS` says.
    `timeout_s` bounds how long a collective waits for a rank that has stopped answering.
    `deterministic` refuses operations that may give other bits on the same input.
    `seed` starts Python's, NumPy's and torch's generators from itself and the rank; null leaves them as they are.

    A group that already exists (a test's, or a notebook's) is used and left open by `close`.
    """

    def __init__(
        self,
        device: str = "auto",
        threads: int | None = None,
        timeout_s: float = 600.0,
        deterministic: bool = False,
        seed: int | None = None,
    ) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else _read_number("RANK", 0)
        self.world_size = dist.get_world_size() if dist.is_initialized() else _read_number("WORLD_SIZE", 1)
        self.local_rank = _read_number("LOCAL_RANK", 0)
        check_collective_timeout(timeout_s, ANSWER_S)
        self.device = _choose_device(device, self.local_rank)
        if self.is_cuda:
            torch.cuda.set_device(self.device)
        if threads is not None:
            torch.set_num_threads(threads)
        if deterministic:
            # cuBLAS reads this once, at its first call; without it deterministic mode raises there.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if seed is not None:
            _seed_generators(seed, self.rank)
        self._timeout = timedelta(seconds=timeout_s)
        self._roll_call: RollCall | None = None
        self._owns_group = "RANK" in os.environ and not dist.is_initialized()
        self.interface: Interface | None = None
        if self._owns_group:
            # torchrun says on how many hosts the ranks are, and where they meet.
            num_hosts = _read_number("GROUP_WORLD_SIZE", 1)
            self.interface = use_interface(os.environ.get("MASTER_ADDR", "localhost"), num_hosts)
            # Gloo serves beside NCCL: small agreements between ranks then need no device synchronisation.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.is_cuda else "gloo",
                timeout=self._timeout,
                device_id=self.device if self.is_cuda else None,
            )
            self._watch_collectives(timeout_s)

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that prints and writes what all share."""
        return self.rank == 0

    @property
    def is_cuda(self) -> bool:
        """Whether this rank computes on a CUDA device."""
        return self.device.type == "cuda"

    def describe(self) -> str:
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        if self.interface is not None and not self.interface.address.is_loopback:
            processes = f"{processes} over {self.interface}"
        if self.is_cuda:
            return f"{processes} on {torch.cuda.get_device_name(self.device)}"
        threads = torch.get_num_threads()
        return f"{processes} on {self.device.type}, {threads} thread{'s' if threads != 1 else ''} each"

    def bound_collectives(self) -> None:
        """Let the timeout hold in every group there is: torch gives each new one 10 or 30 minutes, whatever we say."""
        if self._owns_group:
            for group in list(distributed_c10d._world.pg_map):
                distributed_c10d._set_pg_timeout(self._timeout, group)

    def _watch_collectives(self, timeout_s: float) -> None:
        if self.world_size > 1:
            store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # not in its stubs
            self._roll_call = RollCall(store, self.rank, self.world_size, timeout_s)
            self._roll_call.start()
            explain_with(explain)

    def close(self) -> None:
        """Leave the process group that this environment joined."""
        if self._roll_call is not None:
            self._roll_call.close()
            self._roll_call = None
        if self._owns_group and dist.is_initialized():
            leave_group()
        self._owns_group = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def leave_group() -> None:
    """Destroy the process group, so that this process may end at once.

    A thread of gloo's drops an operation's tensors after whoever waited for it has gone on, and needs the interpreter
    for that. One that asks while the interpreter ends is ended by force within code that may not be left so, and the
    process aborts, after all work is done (seen in PyTorch 2.13, in one of 15 ends of a benchmark).
    """
    time.sleep(GLOO_DROPS_S)
    dist.destroy_process_group()


def _read_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise DistributedError(
            f"the environment variable {name} is {text!r}, not a number", fix="start the ranks with torchrun"
        )
    return int(text)


def _seed_generators(seed: int, rank: int) -> None:
    own = int.from_bytes(hashlib.blake2b(f"process {seed} {rank}".encode(), digest_size=7).digest(), "big")
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if device != "cuda":
        raise DistributedError(f"device is {device!r}", fix="use auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise DistributedError("device is cuda, but this torch sees no CUDA device", fix="use --device cpu, or auto")
    if local_rank >= torch.cuda.device_count():
        raise DistributedError(
            f"local rank {local_rank} has no device of its own: this machine has {torch.cuda.device_count()}",
            fix=f"start at most {torch.cuda.device_count()} processes on it",
        )
    return torch.device("cuda", local_rank)
