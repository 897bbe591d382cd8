"""A stage of a pipeline, cut out of a whole model on meta: what other stages have is absent, every name stays.

The stage is run by the model's own forward, so masks and rotary embeddings are made as ever. Blocks that are absent
pass on what they are given; the one in front of the stage's first block puts in the hidden states that have come from
the stage before, and the one behind its last block keeps what is to be sent on. So it does not matter what the forward
does to its input before the blocks (a scale, positions, dropout), or to the output after them: that is the first and
the last stage's affair, and there it is done.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from forgather.distributed.pipeline_anatomy import Anatomy
from forgather.errors import DistributedError


class Absent(nn.Module):
    """Stands for a module that another stage has: passes on its first argument, or nothing to add to it.

    Its other attributes are those of the module that it stands for, which is on meta.
    """

    def __init__(self, original: nn.Module, num_outputs: int = 0) -> None:
        super().__init__()
        self.__dict__["_original"] = original  # not a child: it has no parameters here
        self._num_outputs = num_outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        if not hidden.is_floating_point() or hidden.dim() < 3:
            # Positions were to be embedded; the sum that they were meant for has been made in the first stage.
            return torch.zeros((), device=hidden.device)
        return self._as_output(self._pass(hidden))

    def _pass(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def _as_output(self, hidden: torch.Tensor) -> Any:
        return (hidden, *[None] * (self._num_outputs - 1)) if self._num_outputs else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)


class Entrance(Absent):
    """Stands for the block in front of the stage's first: gives that what the stage before has sent."""

    received: torch.Tensor | None = None

    def _pass(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.received is None else self.received


class Exit(Absent):
    """Stands for the block behind the stage's last: keeps what is to be sent to the stage after."""

    kept: torch.Tensor | None = None

    def _pass(self, hidden: torch.Tensor) -> torch.Tensor:
        self.kept = hidden
        return hidden


class Part:
    """The blocks `first` to `end` - 1 of a model, and whether its embedding or its head are with them."""

    def __init__(self, stage: int, num_stages: int, first: int, end: int) -> None:
        self.stage = stage
        self.first = first
        self.end = end
        self.is_first = stage == 0
        self.is_last = stage == num_stages - 1

    def describe(self) -> str:
        blocks = f"{self.first}" if self.end - self.first == 1 else f"{self.first}-{self.end - 1}"
        return ("embedding, " if self.is_first else "") + blocks + (", head" if self.is_last else "")


def choose_parts(anatomy: Anatomy, num_stages: int, cuts: Sequence[int] | str) -> list[Part]:
    """The parts of `num_stages` stages: by the given cuts, or with the costliest as cheap as it can be.

    Raises DistributedError for more stages than blocks, and for a cut beyond the last block.
    """
    if num_stages > anatomy.num_blocks:
        raise DistributedError(
            f"{num_stages} stages, and the model has {anatomy.num_blocks} blocks: every stage must have one",
            fix=f"use at most {anatomy.num_blocks} stages (mesh.pipeline x pipeline.stages_per_rank)",
        )
    if isinstance(cuts, str):
        cuts = balance(anatomy.block_costs, anatomy.entry_cost, anatomy.exit_cost, num_stages)
    if cuts and cuts[-1] >= anatomy.num_blocks:
        raise DistributedError(
            f"pipeline.cuts is {list(cuts)}, and the model's blocks are 0 to {anatomy.num_blocks - 1}",
            fix="let every stage begin at a block that there is, or use auto",
        )
    edges = [0, *cuts, anatomy.num_blocks]
    return [Part(stage, num_stages, edges[stage], edges[stage + 1]) for stage in range(num_stages)]


def balance(costs: Sequence[int], entry: int, exit_: int, num_stages: int) -> list[int]:
    """The blocks at which stages begin so that the costliest stage is cheapest; then, the next costliest, roughly.

    Entry and exit are what the first and the last stage have beside their blocks. Every stage has at least one block.
    """
    count = len(costs)
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[e]: the least (maximum, sum of squares) of stages over the first e blocks, and where the last of them begins.
    best: list[tuple[int, int, list[int]] | None] = [
        (entry + sums[end], (entry + sums[end]) ** 2, []) if end else None for end in range(count + 1)
    ]
    for stage in range(1, num_stages):
        extended: list[tuple[int, int, list[int]] | None] = [None] * (count + 1)
        for end in range(stage + 1, count + 1):
            choices = []
            for start in range(stage, end):
                before = best[start]
                if before is not None:
                    own = sums[end] - sums[start] + (exit_ if stage == num_stages - 1 else 0)
                    choices.append((max(before[0], own), before[1] + own**2, [*before[2], start]))
            extended[end] = min(choices) if choices else None
        best = extended
    chosen = best[count]
    assert chosen is not None, "there are as many blocks as stages, or more"
    return chosen[2]


def cut(model: Any, anatomy: Anatomy, parts: Sequence[Part]) -> tuple[Entrance | None, Exit | None]:
    """Take out of `model`, which is on meta, all that is in none of `parts`, the stages that it is to hold.

    Returns where hidden states enter and leave it, of use where it holds one stage. What is tied to a module that stays
    stays too: a head that is tied to the embedding keeps that beside it, so that both have the names they always have.
    """
    blocks = model.get_submodule(anatomy.blocks)
    here = {number for part in parts for number in range(part.first, part.end)}
    first, end = min(here), max(here) + 1
    entrance: Entrance | None = None
    exit_: Exit | None = None
    for number, block in enumerate(blocks):
        if number == first - 1:
            entrance = Entrance(block, anatomy.block_output)
            blocks[number] = entrance
        elif number == end:
            exit_ = Exit(block, anatomy.block_output)
            blocks[number] = exit_
        elif number not in here:
            blocks[number] = Absent(block, anatomy.block_output)
    _take_out_ends(model, anatomy, {part.is_first for part in parts}, {part.is_last for part in parts})
    return entrance, exit_


def _take_out_ends(model: Any, anatomy: Anatomy, is_first: set[bool], is_last: set[bool]) -> None:
    staying = (anatomy.before if True in is_first else []) + (anatomy.after if True in is_last else [])
    kept = {id(p) for name in staying for p in model.get_submodule(name).parameters(recurse=False)}
    loose_ends = False
    for name in [*anatomy.before, *anatomy.after]:
        module = model.get_submodule(name)
        if name in staying:
            continue
        shared = [p for p in module.parameters(recurse=False) if id(p) in kept]
        if shared and name in anatomy.before:
            continue  # the source of a tie
        loose_ends = loose_ends or bool(shared)
        model.set_submodule(name, Absent(module))
    if loose_ends or True not in is_last:
        # transformers would tie what is absent; here is one end of each tie at most.
        model.__dict__["tie_weights"] = _tie_nothing


def _tie_nothing(*_args: Any, **_kwargs: Any) -> None:
    """In place of `tie_weights` where only one end of a tie is."""
