"""Norms of groups of parameters and of their gradients: which part of a model grows, vanishes or explodes."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from forgather.checkpoint.state import TrainState
from forgather.distributed.collectives import gather_objects, sum_ranks
from forgather.distributed.holders import counts_here
from forgather.distributed.mesh import Mesh
from forgather.errors import ConfigError
from forgather.optim.clip import sum_of_squares
from forgather.tensor_boxes import local_part
from forgather.trainers.events import Started, StepEnded
from forgather.trainers.interval import Interval

Of = Literal["gradients", "parameters"]


class Norms:
    """A hook that logs, for each of `patterns`, the 2-norm over all parameters in whose name the pattern is found.

    patterns: name to regular expression; the metrics are `<hook>/gradients/<name>` and `<hook>/parameters/<name>`. A
        parameter may be found by several. One that finds none is a ConfigError.
    of: gradients, parameters, or both. Gradients are measured as the optimizer gets them: after clipping. Parameters
        are measured after the step.
    every: steps between two measurements; set it to `log_every`. A log step shows the newest measurement.

    Norms are over all ranks, each element counted once, and cost one small collective a measurement of each.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        mesh: Mesh,
        *,
        patterns: Mapping[str, str],
        of: Sequence[Of] = ("gradients", "parameters"),
        every: int = 10,
    ) -> None:
        if not of or not set(of) <= {"gradients", "parameters"}:
            raise ConfigError(f"norms are of {list(of)}", fix="use gradients, parameters, or both")
        names = TrainState(model, optimizer).weights()
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.groups: dict[str, list[Tensor]] = {}
        for title, pattern in patterns.items():
            found = _find(pattern, [name for name, parameter in names.items() if id(parameter) in trained])
            self.groups[title] = [names[name] for name in found if counts_here(names[name], mesh)]
        self.of = tuple(of)
        self.interval = Interval("every of the norms", every)
        self.device = mesh.environment.device
        self.step = 0
        self._squares: dict[Of, Tensor] = {}
        if "gradients" in self.of:  # they are gone when the step has ended
            optimizer.register_step_pre_hook(lambda *_: self._measure("gradients", self.step + 1))

    def on_start(self, event: Started) -> None:
        self.step = event.step

    def on_step_end(self, event: StepEnded) -> None:
        self.step = event.step
        if "parameters" in self.of:
            self._measure("parameters", self.step)

    def metrics(self) -> dict[str, float]:
        """The newest norms, on the host; empty before the first measurement."""
        return {
            f"{of}/{title}": norm
            for of, squares in self._squares.items()
            for title, norm in zip(self.groups, squares.sqrt().tolist(), strict=True)
        }

    def _measure(self, of: Of, step: int) -> None:
        if self.interval.is_due(step):
            self._squares[of] = sum_ranks(torch.stack([self._square(of, group) for group in self.groups.values()]))

    def _square(self, of: Of, group: Sequence[Tensor]) -> Tensor:
        chosen = group if of == "parameters" else [p.grad for p in group if p.grad is not None]
        with torch.no_grad():
            return sum_of_squares([local_part(tensor) for tensor in chosen], self.device)


def _find(pattern: str, names: Sequence[str]) -> list[str]:
    """The names of this rank in which `pattern` is found; ConfigError when no rank has one."""
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ConfigError(
            f"{pattern!r} is no regular expression: {error}", fix="put a \\ before what is meant as it is"
        ) from error
    if not any(gather_objects(bool(found))):
        raise ConfigError(
            f"norms: the pattern {pattern!r} is found in no parameter's name",
            fix=f"names are like {', '.join(names[:4])}",
        )
    return found
