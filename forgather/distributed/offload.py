"""Keeping what the backward needs in the host's memory instead of the device's, copied while other things compute.

With `recompute: full` that is the input of each block and no more, and the memory of a step no longer grows with the
number of layers. Rhu et al. 2016, "vDNN", arXiv:1602.08124.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from forgather.distributed.blocks import blocks_for, remember
from forgather.errors import ConfigError

MIN_BYTES = 1024 * 1024  # a smaller tensor is not worth the two transfers


def apply_offload(model: nn.Module, device: torch.device, *, min_bytes: int = MIN_BYTES) -> int:
    """Let each block of `model` keep what it saves for its backward in the host's memory; returns how many blocks.

    After `apply_recompute` and `apply_compile`, so that what these save is what travels, before FSDP. Tensors below
    `min_bytes` and parameters stay where they are. Gradients are the same bits.
    """
    blocks = blocks_for("offload_activations", model)
    store = ActivationStore(device, min_bytes)
    for block in blocks:
        block.forward = Offloaded(block.forward, store)
    remember(model, "activations in the host's memory")
    return len(blocks)


def require_device(device: torch.device) -> None:
    """ConfigError where activations are in the host's memory to begin with."""
    if device.type == "cpu":
        raise ConfigError(
            "offload_activations is true, but the run is on the CPU, where activations are in its memory already",
            fix="leave it false; --recompute full saves memory on a CPU too",
        )


class Offloaded:
    """A forward whose saved tensors are kept in `store`."""

    def __init__(self, forward: Callable[..., Any], store: "ActivationStore") -> None:
        self.forward = forward
        self.store = store

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        with saved_tensors_hooks(self.store.pack, self.store.unpack):
            return self.forward(*args, **kwargs)


def _no_parcel() -> "Parcel | None":
    return None


class Parcel:
    """A tensor that was sent to the host; `original` is the tensor itself until its memory is given up."""

    def __init__(self, original: Tensor, previous: "Parcel | None") -> None:
        self.original: Tensor | None = original
        self.host = torch.empty_like(original, device="cpu", pin_memory=original.is_cuda)
        self.back: Tensor | None = None
        self.sent: Any = None  # on CUDA: events
        self.arrived: Any = None
        if original.is_cuda:
            self.sent, self.arrived = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.previous = _no_parcel if previous is None else weakref.ref(previous)


class ActivationStore:
    """Copies tensors to the host and back on a stream of its own, so that the device goes on computing meanwhile.

    The device's memory is given up when the copy is made, or when `stay` more tensors have been saved: computing then
    waits for the copy, or memory would fill with what is on its way. What has not gone yet when the backward asks is
    there at once; for the rest, each tensor that is fetched sets out the `ahead` that will be asked for next.
    """

    def __init__(self, device: torch.device, min_bytes: int = MIN_BYTES, *, stay: int = 8, ahead: int = 8) -> None:
        self.device = device
        self.min_bytes = min_bytes
        self.stay = stay
        self.ahead = ahead
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._leaving: dict[tuple[Any, ...], Parcel] = {}  # in the order in which they were sent
        self._newest: Callable[[], Parcel | None] = _no_parcel

    def pack(self, tensor: Tensor) -> Tensor | Parcel:
        """What autograd keeps instead of `tensor`: itself where that is not worth it. One saved twice travels once."""
        if not self._is_worth_it(tensor):
            return tensor
        # While it is here, no other tensor has its place in memory.
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if key not in self._leaving:
            self._leaving[key] = self._send(tensor.detach())
        parcel = self._leaving[key]
        while len(self._leaving) > self.stay:
            self._give_up(next(iter(self._leaving)))
        return parcel

    def unpack(self, kept: Tensor | Parcel) -> Tensor:
        """The tensor again, when the backward asks for it."""
        if not isinstance(kept, Parcel):
            return kept
        if kept.original is not None:
            self._leaving = {key: parcel for key, parcel in self._leaving.items() if parcel is not kept}
            return kept.original
        parcel: Parcel | None = kept
        for _ in range(1 + self.ahead):
            if parcel is None or parcel.original is not None:
                break
            self._fetch(parcel)
            parcel = parcel.previous()
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.arrived)
        assert kept.back is not None
        return kept.back

    def _send(self, tensor: Tensor) -> Parcel:
        parcel = Parcel(tensor, self._newest())
        self._newest = weakref.ref(parcel)
        if self.stream is None:
            parcel.host.copy_(tensor)
            return parcel
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            parcel.host.copy_(tensor, non_blocking=True)
            parcel.sent.record(self.stream)
        return parcel

    def _give_up(self, key: tuple[Any, ...]) -> None:
        parcel = self._leaving.pop(key)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(parcel.sent)  # what reuses the memory comes after
        parcel.original = None

    def _fetch(self, parcel: Parcel) -> None:
        if parcel.back is not None:
            return
        parcel.back = torch.empty_like(parcel.host, device=self.device)
        if self.stream is None:
            parcel.back.copy_(parcel.host)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # what used the memory before has ended
        with torch.cuda.stream(self.stream):
            parcel.back.copy_(parcel.host, non_blocking=True)
            parcel.arrived.record(self.stream)
        parcel.back.record_stream(self.stream)  # one that is fetched ahead may be dropped before it has arrived

    def _is_worth_it(self, tensor: Tensor) -> bool:
        if tensor.device != self.device or tensor.nbytes < self.min_bytes or type(tensor) is not Tensor:
            return False
        # Parameters, and the transposed view of one that a linear layer saves, are kept anyway.
        return not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
