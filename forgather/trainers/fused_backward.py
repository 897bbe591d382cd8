"""Applying the optimizer within the backward: each gradient is used and freed as soon as it is made.

Instead of all gradients of a model, memory holds those of one FSDP group at a time. Lv et al. 2023, "Full Parameter
Fine-tuning for Large Language Models with Limited Resources", arXiv:2306.09782, section 3.2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from forgather.distributed.collectives import sum_ranks, world_size
from forgather.distributed.holders import counts_here
from forgather.distributed.mesh import Mesh
from forgather.distributed.mixed_precision import Precision
from forgather.errors import ConfigError
from forgather.optim.clip import sum_of_squares
from forgather.tensor_boxes import local_part


class FusedBackward:
    """Steps `optimizer` for one parameter after the other, each when its gradient is complete.

    Updates are those of a step of all parameters together, to the bit. The norm is known at the end only, so a gradient
    that is not finite is left out alone, and those before it are not. On a device the optimizer has to read a flag
    (`found_inf`) for that; the host then never waits.
    """

    def __init__(self, optimizer: Optimizer, mesh: Mesh, *, flag: Tensor | None) -> None:
        self.optimizer = optimizer
        self.mesh = mesh
        self.flag = flag
        self.device = mesh.environment.device
        self._square = torch.zeros((), dtype=torch.float64, device=self.device)
        self._counted: set[Tensor] = set()
        self._places: dict[Tensor, tuple[dict[str, Any], int]] = {}
        for group in optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                self._places[parameter] = (group, number)
                if counts_here(parameter, mesh):
                    self._counted.add(parameter)
                parameter.register_post_accumulate_grad_hook(self._apply)

    def begin(self, loss: Tensor) -> bool:
        """Make ready for the backward of `loss`, 0-d; whether it is to be run: a loss that is not finite is not.

        All ranks call it. On a device the backward is run, and the flag keeps it from changing anything.
        """
        if self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks:
            raise ConfigError(
                "fuse_optimizer_with_backward: something hangs on the optimizer's steps; each parameter has one now",
                fix="take the hook away, or do not fuse",
            )
        total = sum_ranks(loss.detach().clone())
        self._square.zero_()
        if self.flag is not None:
            self.flag.copy_(total.isfinite().logical_not())
            return True
        return bool(total.isfinite())

    def norm(self, riding: Tensor) -> tuple[Tensor, Tensor]:
        """The 2-norm of all gradients that the last backward made, and `riding` summed over the ranks; see
        `GradientClip.norm`.
        """
        if world_size() == 1:
            return self._square.sqrt().float(), riding
        both = sum_ranks(torch.stack([self._square, riding.to(self._square.dtype)]))
        return both[0].sqrt().float(), both[1].to(riding.dtype)

    @torch.no_grad()
    def _apply(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None, "autograd calls this when a gradient is there"
        square = sum_of_squares([local_part(gradient)], self.device)
        if parameter in self._counted:
            self._square += square
        if self.flag is not None:
            self.flag.logical_or_(square.isfinite().logical_not())
        if self.flag is not None or bool(square.isfinite()):
            with self._alone(parameter):
                self.optimizer.step()
        parameter.grad = None

    @contextmanager
    def _alone(self, parameter: Tensor) -> Iterator[None]:
        """Within, the optimizer has no parameter but this one, with its state and the options of its group."""
        groups = self.optimizer.param_groups
        group, number = self._places[parameter]
        own: dict[str, Any] = {key: [group[key][number]] for key in ("params", "param_names") if key in group}
        self.optimizer.param_groups = [{**group, **own}]
        try:
            yield
        finally:
            self.optimizer.param_groups = groups


def refuse_unfit(
    mesh: Mesh, *, precision: Precision, max_grad_norm: float | None, num_microbatches: int, on_non_finite: str
) -> None:
    """ConfigError where the optimizer cannot be fused with the backward, naming what stands in the way."""
    obstacles = [
        (
            max_grad_norm is not None,
            f"max_grad_norm is {max_grad_norm}, and the norm is known only when all is applied",
            "--max-grad-norm null",
        ),
        (
            num_microbatches > 1,
            f"a step has {num_microbatches} microbatches, whose gradients are to be added up first",
            "raise rows_per_forward, or lower rows_per_step",
        ),
        (precision == "fp16", "precision is fp16, whose gradients are checked before any is applied", "use bf16"),
        (on_non_finite == "skip", "on_non_finite is skip, but a part is applied when it shows", "use stop"),
        (
            mesh.pipeline > 1,
            f"mesh.pipeline is {mesh.pipeline}, and a stage has a backward for each microbatch",
            "use mesh.shard",
        ),
        (
            mesh.replicate > 1 and mesh.shard == 1,
            f"mesh.replicate is {mesh.replicate} without shards, whose gradients are summed after the backward",
            "use mesh.shard",
        ),
    ]
    for applies, reason, fix in obstacles:
        if applies:
            raise ConfigError(f"fuse_optimizer_with_backward: {reason}", fix=f"{fix}, or do not fuse")
