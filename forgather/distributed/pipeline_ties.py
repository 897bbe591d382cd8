"""Parameters that two stages hold, as an embedding tied to the head: one parameter of the model still.

Each holder computes a part of the gradient. The parts are summed, so that both make the same update of the same values;
one of them counts in the norm. Where one rank has both stages (a V), its union shows the first holder only, and the
second has copies of its values: it belongs to another stage, which FSDP gathers by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forgather.distributed.holders import mark_counted_elsewhere
from forgather.distributed.pipeline_anatomy import Anatomy
from forgather.tensor_boxes import local_part


@dataclass(frozen=True)
class Tie:
    """One tied parameter as this rank has it: as the first stage's, the last stage's, both, or (neither) not at all."""

    name: str
    first: nn.Parameter | None
    last: nn.Parameter | None


class Ties:
    """What is tied between the first stage, on `first_rank` of the pipeline's `group`, and the last, on `last_rank`.

    `first` and `last` are the models of these stages where this rank has them.
    """

    def __init__(
        self,
        whole: nn.Module,
        anatomy: Anatomy,
        *,
        first: nn.Module | None,
        last: nn.Module | None,
        first_rank: int,
        last_rank: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.group = group
        self.first_rank = first_rank
        self.last_rank = last_rank
        self.ties = [
            Tie(
                name,
                None if first is None else first.get_parameter(name),
                None if last is None else last.get_parameter(name),
            )
            for name in find_tied(whole, anatomy)
        ]
        for tie in self.ties:
            if tie.first is None and tie.last is not None:
                mark_counted_elsewhere(tie.last)

    def sum_gradients(self) -> None:
        """Give both holders the sum of their gradients. The ranks that hold a tied parameter call it together."""
        for tie in self.ties:
            if tie.first is not None and tie.last is not None:
                if tie.first.grad is not None and tie.last.grad is not None:
                    tie.first.grad += tie.last.grad
                tie.last.grad = None
            elif tie.first is not None:
                self._exchange(tie.first, self.last_rank)
            elif tie.last is not None:
                self._exchange(tie.last, self.first_rank)

    @torch.no_grad()
    def copy_values(self) -> None:
        """Give the second holder the first's values, where this rank has both."""
        for tie in self.ties:
            if tie.first is not None and tie.last is not None:
                local_part(tie.last).copy_(local_part(tie.first))

    def _exchange(self, parameter: nn.Parameter, other: int) -> None:
        if parameter.grad is None:  # frozen, in both stages
            return
        mine = local_part(parameter.grad)
        theirs = torch.empty_like(mine, memory_format=torch.contiguous_format)
        operations = [
            dist.P2POp(dist.isend, mine.contiguous(), group=self.group, group_peer=other),
            dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=other),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        mine += theirs  # a sum of two: the same bits on both


def find_tied(whole: Any, anatomy: Anatomy) -> list[str]:
    """The parameters, by their first name, that stand both before and after the blocks of `whole`."""
    before, after = (dict(_named(whole, names)) for names in (anatomy.before, anatomy.after))
    return [name for parameter, name in before.items() if parameter in after]


def _named(whole: nn.Module, modules: Sequence[str]) -> Iterator[tuple[Tensor, str]]:
    for module in modules:
        for name, parameter in whole.get_submodule(module).named_parameters(recurse=False):
            yield parameter, f"{module}.{name}"
