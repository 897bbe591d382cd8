"""Tables that a module computes and no checkpoint holds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ComputedBuffers(nn.Module):
    """A module whose buffers are computed by `reset_buffers`, and float32 whatever the model is cast to.

    In bfloat16 a position above 256 would no longer be an integer. After `to_empty` somebody must call `reset_buffers`.
    """

    def reset_buffers(self) -> None:
        """Compute the buffers anew on the device they are on."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if any(buffer.is_floating_point() and buffer.dtype != torch.float32 for buffer in self.buffers(recurse=False)):
            self.reset_buffers()
        return self
