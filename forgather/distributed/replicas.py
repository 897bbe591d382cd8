"""Plain replication: every rank has all parameters (of its stage, of its part of each matrix) and reads other rows.

Gradients are summed over the replicas while the backward still runs. This is what DistributedDataParallel does, without
a module around the model: names and classes stay as they are. Large gradients are summed where they lie; small ones
travel in buckets. Gradients of less than 32 bits are summed in 32, as FSDP does it: added up in bf16, a gradient over 8
replicas is rounded 7 times, and the run is another one on each number of them.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forgather.tensor_boxes import local_part

MIB = 1024 * 1024
# A message of one to three MiB costs more in its beginning and end than in its bytes: with one for each matrix of that
# size a step of two processes of 7M parameters on gloo had 0.96 of the speed that it has with these.
LARGE_MIB = 8.0  # from here on a gradient is worth a message of its own, without a copy into a bucket
BUCKET_MIB = 25.0
# How many buckets of low-precision gradients may be summed in fp32 at once. Each has memory of its own until it is
# rounded: for all of them that would be 4 bytes a parameter. While one is summed the next can wait; more gain nothing.
IN_FP32_AT_ONCE = 2


@dataclass
class Bucket:
    """Gradients that are summed by one collective: one large one, or neighbours that are small."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    buffer: Tensor | None = None  # of small ones: all of them, flat
    num_missing: int = 0
    work: Any = None
    in_fp32: bool = False  # summed in memory that is there only meanwhile, and rounded once


class Replicas:
    """Sums the gradients of `model` over the ranks of `group`, in the last backward of a step.

    `is_last` says whether the backward to come is that one; gradients of the others only add up here. A parameter that
    this rank has not used counts as zero.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.model = model
        self.group = group
        self.is_last = True
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[Tensor, Bucket] = {}
        self._hooks: list[Any] = []
        self._seen: set[Tensor] = set()
        self._in_fp32: deque[Bucket] = deque()  # those that are being summed so, the oldest first
        self._launched = 0
        self._ending = False  # the engine has been asked to call us at the end of this backward
        # Parameters may still be replaced until the first forward: materialising and tying do it.
        model.register_forward_pre_hook(self._prepare)

    def ready(self, parameter: Tensor) -> None:
        """The gradient of `parameter` is complete on this rank: a hook on each, called by autograd."""
        if not self.is_last:
            return
        if not self._ending:
            self._ending = True
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        if parameter in self._seen:
            return
        self._seen.add(parameter)
        bucket = self._bucket_of[parameter]
        bucket.num_missing -= 1
        self._launch_complete()

    def finish(self) -> None:
        """Sum what is not summed yet, and wait for all: the end of the last backward. All ranks call it."""
        with torch.no_grad():
            for bucket in self._buckets[self._launched :]:
                self._launch(bucket)
            for bucket in self._buckets:
                self._await(bucket)
                bucket.num_missing = len(bucket.parameters)
        self._in_fp32.clear()
        self._seen.clear()
        self._launched, self._ending = 0, False

    def _launch_complete(self) -> None:
        # In the order of the buckets, whatever the order in which they are complete: it must be the same on all ranks.
        while self._launched < len(self._buckets) and self._buckets[self._launched].num_missing == 0:
            self._launch(self._buckets[self._launched])
            self._launched += 1

    def _launch(self, bucket: Bucket) -> None:
        gradients = [_gradient(parameter) for parameter in bucket.parameters]
        if bucket.in_fp32:
            while len(self._in_fp32) >= IN_FP32_AT_ONCE:
                self._await(self._in_fp32.popleft())
            self._in_fp32.append(bucket)
            bucket.buffer = torch.cat([gradient.flatten().float() for gradient in gradients])
            bucket.work = dist.all_reduce(bucket.buffer, group=self.group, async_op=True)
            return
        if bucket.buffer is None:
            if not gradients[0].is_contiguous():
                gradients[0].data = gradients[0].contiguous()
            bucket.work = dist.all_reduce(gradients[0], group=self.group, async_op=True)
            return
        pieces = torch.split(bucket.buffer, [gradient.numel() for gradient in gradients])
        views = [piece.view(gradient.shape) for piece, gradient in zip(pieces, gradients, strict=True)]
        torch._foreach_copy_(views, gradients)
        bucket.work = dist.all_reduce(bucket.buffer, group=self.group, async_op=True)
        for gradient, view in zip(gradients, views, strict=True):
            gradient.data = view  # what the sum is written to

    def _await(self, bucket: Bucket) -> None:
        """Return when the gradients of a bucket are the sums, unless they are already."""
        if bucket.work is None:
            return
        bucket.work.wait()
        bucket.work = None  # with the memory that it refers to
        if bucket.in_fp32:
            self._take_sums(bucket)

    @staticmethod
    def _take_sums(bucket: Bucket) -> None:
        assert bucket.buffer is not None, "what is summed in fp32 has been launched"
        gradients = [_gradient(parameter) for parameter in bucket.parameters]
        pieces = torch.split(bucket.buffer, [gradient.numel() for gradient in gradients])
        sums = [piece.view(gradient.shape) for piece, gradient in zip(pieces, gradients, strict=True)]
        torch._foreach_copy_(gradients, sums)
        bucket.buffer = None

    def _prepare(self, _model: nn.Module, _args: Any) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if torch.is_grad_enabled() and self._bucket_of.keys() != set(parameters):
            for hook in self._hooks:
                hook.remove()
            self._buckets = list(_fill_buckets(reversed(parameters)))
            self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
            self._hooks = [parameter.register_post_accumulate_grad_hook(self.ready) for parameter in parameters]  # type: ignore[no-untyped-call]


def _fill_buckets(parameters: Iterable[nn.Parameter]) -> Iterator[Bucket]:
    """Buckets of `parameters`, which come in the order in which their gradients do."""
    small: list[nn.Parameter] = []
    for parameter in parameters:
        if _mib(parameter) >= LARGE_MIB:
            yield Bucket([parameter], num_missing=1, in_fp32=_is_low(parameter))
            continue
        if small and (_is_other(parameter, small[0]) or sum(map(_mib, small)) + _mib(parameter) > BUCKET_MIB):
            yield _bucket(small)
            small = []
        small.append(parameter)
    if small:
        yield _bucket(small)


def _bucket(parameters: list[nn.Parameter]) -> Bucket:
    if _is_low(parameters[0]):
        return Bucket(parameters, None, len(parameters), in_fp32=True)
    buffer = local_part(parameters[0]).new_empty(sum(local_part(parameter).numel() for parameter in parameters))
    return Bucket(parameters, buffer, len(parameters))


def _is_low(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _is_other(parameter: Tensor, first: Tensor) -> bool:
    return (parameter.dtype, parameter.device) != (first.dtype, first.device)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local_part(parameter.grad)


def _mib(tensor: Tensor) -> float:
    return local_part(tensor).numel() * tensor.element_size() / MIB
