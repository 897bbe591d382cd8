"""Cross-entropy of `hidden @ weight.T` without holding all logits, exact in fp32 and in bf16.

Gradients are made in the forward, chunk by chunk, as `torch.nn.functional.linear_cross_entropy` does. That operation is
not used: in bf16 it adds the losses up in bf16 (off by 0.2 to 0.6 %), and each of its calls costs half a millisecond
of preparation, which a step of a small model feels. At 1k to 1M logits a chunk this is as fast or faster.
Where ranks share the head among them, each has the logits of its part of the vocabulary, and they tell one another
three numbers a row: the highest logit, the sum of exponentials, and the target's logit.
Shapes: N rows, C rows of a chunk, D hidden size, V vocabulary (this rank's part), S vocabulary entries of a slice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from forgather.data.batch import NO_TARGET

# In bf16, logits are fp32 and gradients are added up in fp32. Slices of the vocabulary bound what is cast on the way:
# 16 MiB at D = 512.
SLICE = 8192


@dataclass(frozen=True)
class VocabularyPart:
    """Which rows of the head a rank has: those from `first` on, the others are with the other ranks of `group`."""

    first: int
    group: dist.ProcessGroup


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_rows: int, part: VocabularyPart | None = None
) -> Tensor:
    """The sum of cross-entropy over the targets that are not -100: 0-d, fp32, within 1e-5 of a softmax in fp32.

    With `part`, all ranks of its group call it with the same rows; the loss is that of the whole vocabulary, and the
    gradient of the hidden states is this rank's part of it, still to be summed over the group.
    """
    with_gradient = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk_rows, part, with_gradient)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward, chunk by chunk, while the chunk's probabilities are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        chunk_rows: int,
        part: VocabularyPart | None,
        with_gradient: bool,
    ) -> Tensor:
        loss, gradients = _in_chunks(hidden_ND, weight_VD, targets_N, chunk_rows, part, with_gradient)
        if gradients is not None:
            hidden_grad_ND, weight_grad_VD = gradients
            ctx.save_for_backward(hidden_grad_ND, weight_grad_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (grad,) = grad_outputs
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        # The scale is a 0-d fp32 tensor, so the products keep the type of the gradients.
        return hidden_grad_ND * grad, weight_grad_VD * grad, None, None, None, None


def _in_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk_rows: int,
    part: VocabularyPart | None,
    with_gradient: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The loss, and the gradients of the hidden states and of the weight; the latter is fp32."""
    num_rows, vocabulary = len(hidden_ND), len(weight_VD)
    loss = torch.zeros((), device=hidden_ND.device)
    gradients = (
        (torch.empty_like(hidden_ND), torch.zeros_like(weight_VD, dtype=torch.float32)) if with_gradient else None
    )
    # One buffer for all chunks: fresh memory of this size costs more than what is computed in it.
    buffer = torch.empty((min(chunk_rows, num_rows), vocabulary), device=hidden_ND.device)
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, num_rows))
        chunk = _Chunk(hidden_ND[rows], weight_VD, targets_N[rows], buffer[: rows.stop - rows.start], part)
        loss += chunk.loss()
        if gradients is not None:
            hidden_grad_ND, weight_grad_VD = gradients
            hidden_grad_ND[rows] = chunk.gradients(weight_grad_VD)
    return loss, gradients


class _Chunk:
    """The logits of some rows, made, turned to probabilities and to gradients in one buffer.

    On a CPU this goes slice by slice of the vocabulary, so that each is still in the cache for the next operation. The
    softmax is taken with the highest logit so far, and what that was is made up for at the end: Milakov and Gimelshein
    2018, "Online normalizer calculation for softmax", arXiv:1805.02867.
    """

    def __init__(
        self,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        targets_C: Tensor,
        buffer_CV: Tensor,
        part: VocabularyPart | None,
    ) -> None:
        self.hidden_CD = hidden_CD
        self.weight_VD = weight_VD
        self.part = part
        self.counted_C1 = targets_C.unsqueeze(1) != NO_TARGET
        self.targets_C1 = targets_C.unsqueeze(1) - (0 if part is None else part.first)  # by rows of this weight
        self.buffer_CV = buffer_CV
        # On a GPU an operation costs its launch, so there is one slice.
        vocabulary = len(weight_VD)
        self.slices = [slice(0, vocabulary)] if hidden_CD.is_cuda else list(_slices(vocabulary))
        self.max_C1 = buffer_CV.new_full((len(hidden_CD), 1), -torch.inf)
        self.sum_C1 = buffer_CV.new_zeros((len(hidden_CD), 1))
        self.max_by_slice: list[Tensor] = []

    def loss(self) -> Tensor:
        """The sum over the rows that count; leaves exp(logits - highest so far) in the buffer."""
        target_logits_C1 = torch.zeros_like(self.sum_C1)
        for entries in self.slices:
            logits_CS = self.buffer_CV[:, entries]
            _multiply(self.hidden_CD, self.weight_VD[entries], out=logits_CS)
            index_C1, is_here_C1 = self._targets_in(entries)
            target_logits_C1 += logits_CS.gather(1, index_C1).masked_fill_(~is_here_C1, 0.0)
            max_C1 = torch.maximum(self.max_C1, logits_CS.amax(1, keepdim=True))
            self.sum_C1 *= (self.max_C1 - max_C1).exp_()
            self.sum_C1 += logits_CS.sub_(max_C1).exp_().sum(1, keepdim=True)
            self.max_C1 = max_C1
            self.max_by_slice.append(max_C1)
        if self.part is not None:
            target_logits_C1 = self._join_parts(target_logits_C1, self.part.group)
        losses_C1 = self.sum_C1.log().add_(self.max_C1).sub_(target_logits_C1)
        return losses_C1.masked_fill_(~self.counted_C1, 0.0).sum()

    def _join_parts(self, target_logits_C1: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Make the highest logits and the sums those of the whole vocabulary; returns such logits of the targets."""
        own_3C = torch.stack([self.max_C1, self.sum_C1, target_logits_C1]).squeeze(2)
        parts_R3C = own_3C.new_empty(group.size(), *own_3C.shape)
        dist.all_gather_single(parts_R3C.view(-1), own_3C.view(-1), group=group)
        max_RC, sum_RC, target_logits_RC = parts_R3C.unbind(1)
        self.max_C1 = max_RC.amax(0).unsqueeze(1)
        self.sum_C1 = (sum_RC * (max_RC - self.max_C1.T).exp_()).sum(0).unsqueeze(1)
        return target_logits_RC.sum(0).unsqueeze(1)

    def gradients(self, weight_grad_VD: Tensor) -> Tensor:
        """The gradient of the hidden states, [C, D] fp32; the weight's is added to `weight_grad`, which is fp32."""
        hidden_grad_CD = torch.zeros_like(self.hidden_CD, dtype=torch.float32)
        for entries, max_C1 in zip(self.slices, self.max_by_slice, strict=True):
            scale_C1 = (max_C1 - self.max_C1).exp_().div_(self.sum_C1).mul_(self.counted_C1)
            grad_CS = self.buffer_CV[:, entries].mul_(scale_C1)
            index_C1, is_here_C1 = self._targets_in(entries)
            grad_CS.scatter_add_(1, index_C1, -is_here_C1.float())
            low_grad_CS = grad_CS.to(self.hidden_CD.dtype)
            _add_product(hidden_grad_CD, low_grad_CS, self.weight_VD[entries])
            _add_product(weight_grad_VD[entries], low_grad_CS.T, self.hidden_CD)
        return hidden_grad_CD

    def _targets_in(self, entries: slice) -> tuple[Tensor, Tensor]:
        """Where in a slice each row's target stands, and whether it is one that counts and stands there."""
        index_C1 = self.targets_C1 - entries.start
        width = entries.stop - entries.start
        return index_C1.clamp(0, width - 1), (index_C1 >= 0) & (index_C1 < width) & self.counted_C1


def _multiply(hidden_CD: Tensor, weight_VD: Tensor, out: Tensor) -> None:
    """`hidden @ weight.T` in fp32: logits rounded to bf16 would put the loss off by 1e-5 and more."""
    if hidden_CD.dtype == torch.float32:
        torch.mm(hidden_CD, weight_VD.T, out=out)
        return
    if hidden_CD.is_cuda:
        # The matrix units add up in fp32 anyway; this only keeps them from rounding at the end.
        out.copy_(torch.mm(hidden_CD, weight_VD.T, out_dtype=torch.float32))
        return
    hidden_CD = hidden_CD.float()
    for entries in _slices(len(weight_VD)):
        torch.mm(hidden_CD, weight_VD[entries].float().T, out=out[:, entries])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, which is fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
        return
    for rows in _slices(len(total)):  # they bound what is rounded to bf16 on the way
        total[rows] += left[rows] @ right


def _slices(vocabulary: int) -> Iterator[slice]:
    return (slice(first, min(first + SLICE, vocabulary)) for first in range(0, vocabulary, SLICE))
