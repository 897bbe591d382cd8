"""Cross-entropy of `hidden @ weight.T` without holding all logits, exact in fp32 and in bf16.

Gradients are made in the forward, chunk by chunk, as `torch.nn.functional.linear_cross_entropy` does. That operation is
not used: in bf16 it adds the losses up in bf16 (off by 0.2 to 0.6 %), and each of its calls costs half a millisecond
of preparation, which a step of a small model feels. At 1k to 1M logits a chunk this is as fast or faster.
Shapes: N rows, C rows of a chunk, D hidden size, V vocabulary, S vocabulary entries of a slice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from forgather.data.batch import NO_TARGET

# In bf16, logits are fp32 and the gradient of the weight is added up in fp32. Slices of the vocabulary bound what is
# cast on the way: 16 MiB at D = 512.
SLICE = 8192


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_rows: int) -> Tensor:
    """The sum of cross-entropy over the targets that are not -100: 0-d, fp32, within 1e-5 of a softmax in fp32."""
    with_gradient = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk_rows, with_gradient)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward, chunk by chunk, while the chunk's probabilities are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_rows: int, with_gradient: bool
    ) -> Tensor:
        num_rows, vocabulary = len(hidden_ND), len(weight_VD)
        loss = torch.zeros((), device=hidden_ND.device)
        hidden_grad_ND = torch.empty_like(hidden_ND) if with_gradient else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if with_gradient else None
        # One buffer for all chunks: fresh memory of this size costs more than what is computed in it.
        buffer = torch.empty((min(chunk_rows, num_rows), vocabulary), device=hidden_ND.device)
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, num_rows))
            hidden_CD, targets_C, logits_CV = hidden_ND[rows], targets_N[rows], buffer[: rows.stop - rows.start]
            counted_C = targets_C != NO_TARGET
            index_C1 = targets_C.clamp(min=0).unsqueeze(1)
            _multiply(hidden_CD, weight_VD, out=logits_CV)
            target_logits_C = logits_CV.gather(1, index_C1).squeeze(1)
            # In place from here: softmax as exp(logits - max) / sum, with the loss read off on the way.
            max_C1 = logits_CV.amax(1, keepdim=True)
            sum_C1 = logits_CV.sub_(max_C1).exp_().sum(1, keepdim=True)
            losses_C = sum_C1.log().add_(max_C1).squeeze(1) - target_logits_C
            loss += losses_C.masked_fill(~counted_C, 0.0).sum()
            if hidden_grad_ND is None or weight_grad_VD is None:
                continue
            grad_CV = logits_CV.mul_(counted_C.unsqueeze(1) / sum_C1)
            grad_CV.scatter_add_(1, index_C1, -counted_C.unsqueeze(1).float())
            low_grad_CV = grad_CV.to(hidden_ND.dtype)
            torch.mm(low_grad_CV, weight_VD, out=hidden_grad_ND[rows])
            _add_product(weight_grad_VD, low_grad_CV, hidden_CD)
        if hidden_grad_ND is not None and weight_grad_VD is not None:
            ctx.save_for_backward(hidden_grad_ND, weight_grad_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad,) = grad_outputs
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        # The scale is a 0-d fp32 tensor, so the products keep the type of the gradients.
        return hidden_grad_ND * grad, weight_grad_VD * grad, None, None, None


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


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add `grad.T @ hidden` to `total`, which is fp32."""
    if hidden_CD.dtype == torch.float32:
        total_VD.addmm_(grad_CV.T, hidden_CD)
        return
    for entries in _slices(grad_CV.shape[1]):
        total_VD[entries] += grad_CV[:, entries].T @ hidden_CD


def _slices(vocabulary: int) -> Iterator[slice]:
    return (slice(first, min(first + SLICE, vocabulary)) for first in range(0, vocabulary, SLICE))
