"""The nearest matrix whose singular values are all about 1, by a few products of matrices."""

import torch
from torch import Tensor

# Jordan et al., Muon, 2024: the steepest slope at 0; singular values end between about 0.7 and 1.2, which does no harm.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """`steps` of a quintic Newton-Schulz iteration over the last two dimensions, in the dtype of `matrix`.

    Leading dimensions are a stack of matrices, each for itself.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    # The norm of all elements bounds the largest singular value, which must not be above 1.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = _times_and_add(_times_and_add(gram, gram, gram, b, c), x, x, a)
    return x.mT if is_tall else x


def _times_and_add(left: Tensor, right: Tensor, added: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """`beta * added + alpha * left @ right`."""
    if added.dim() == 2:
        return torch.addmm(added, left, right, beta=beta, alpha=alpha)
    return (left @ right).mul_(alpha).add_(added, alpha=beta)
