"""Which parameters are exchanged together, and which fragment's turn it is (Streaming DiLoCo, arXiv:2501.18512).

A model is cut between its blocks: the modules that are numbered in the parameters' names (`model.layers.7.`). What
stands before the first block (embeddings) and behind the last (norm and head) are units of their own, as they may be as
large as many blocks; what stands between blocks belongs to the one before it.
"""

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal

from forgather.errors import ConfigError

Assignment = Literal["strided", "sequential"]
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def divide(
    parameters: Mapping[str, Sequence[int]], num_fragments: int, assignment: Assignment = "strided"
) -> list[list[str]]:
    """The names of each fragment's parameters, given as name: shape in the model's order, and kept in that order.

    `strided`: blocks take turns, so every fragment has early and late ones; what is large and no block goes first, and
    each next block to the fragment that is smallest. `sequential`: neighbours stay together, with the least sum of
    squared sizes. One fragment is the whole model. ConfigError for more fragments than blocks.
    """
    if assignment not in ("strided", "sequential"):
        raise ConfigError(f"the assignment of fragments is {assignment!r}", fix="strided or sequential")
    units, num_blocks = _units(list(parameters))
    if not 1 <= num_fragments <= max(1, num_blocks):
        raise ConfigError(
            f"{num_fragments} fragments of a model with {num_blocks} blocks",
            fix=f"a number of fragments from 1 to {max(1, num_blocks)}",
        )
    sizes = [sum(prod(parameters[name]) for name in unit.names) for unit in units]
    if assignment == "sequential":
        chosen = _neighbours(sizes, num_fragments)
    else:
        chosen = _take_turns(sizes, [unit.is_block for unit in units], num_fragments)
    fragment_of = {name: each for unit, each in zip(units, chosen, strict=True) for name in unit.names}
    return [[name for name in parameters if fragment_of[name] == each] for each in range(num_fragments)]


def due(step: int, sync_every: int, num_fragments: int) -> int | None:
    """The fragment that is sent after `step` inner steps, counted from 1; None for none.

    Fragments follow one another at equal distances, the last after `sync_every` steps, and each is sent once in
    `sync_every` steps, also where their number does not divide it.
    """
    if step < 1:
        return None
    within = (step - 1) % sync_every + 1
    turn = -(-within * num_fragments // sync_every)  # the first that comes at `within` or later, counted from 1
    return turn - 1 if turn * sync_every // num_fragments == within else None


def require_schedule(sync_every: int, num_fragments: int) -> None:
    """ConfigError unless every fragment has a step of its own among `sync_every`."""
    if sync_every < 1:
        raise ConfigError(f"sync_every is {sync_every}", fix="sync_every: 100, or another number of steps from 1")
    if num_fragments < 1:
        raise ConfigError(f"the model is divided into {num_fragments} fragments", fix="a number of fragments from 1")
    if num_fragments > sync_every:
        raise ConfigError(
            f"{num_fragments} fragments cannot take turns in {sync_every} steps",
            fix=f"sync_every: {num_fragments} or more, or at most {sync_every} fragments",
        )


class _Unit:
    """Parameters that stay together."""

    def __init__(self, *, is_block: bool) -> None:
        self.is_block = is_block
        self.names: list[str] = []


def _units(names: Sequence[str]) -> tuple[list[_Unit], int]:
    """The units in the model's order, and how many of them are blocks.

    A model without numbered modules is divided between the modules that have parameters.
    """
    block_of = _blocks(names) or {name: (name.rpartition(".")[0], 0) for name in names}
    # Lists in the order in which they appear, blocks by number: names may come sorted as text, with 10 before 2.
    lists = list(dict.fromkeys(block_of[name][0] for name in names if name in block_of))
    keys = sorted(set(block_of.values()), key=lambda key: (lists.index(key[0]), key[1]))
    blocks = {key: _Unit(is_block=True) for key in keys}
    before, behind = _Unit(is_block=False), _Unit(is_block=False)
    last = max((at for at, name in enumerate(names) if name in block_of), default=-1)
    unit = before
    for at, name in enumerate(names):
        if name in block_of:
            unit = blocks[block_of[name]]
        elif at > last:
            unit = behind
        unit.names.append(name)
    units = [unit for unit in (before, *blocks.values(), behind) if unit.names]
    return units, len(blocks)


def _blocks(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """For each name in a block: the list that it is in, and its number there.

    The list is the outermost with more than one member: `stages.0.layers.7.` is block 7 where there is one stage.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            numbers.setdefault(name[: match.start()], set()).add(int(match[0]))
    found = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            if len(numbers[name[: match.start()]]) > 1:
                found[name] = (name[: match.start()], int(match[0]))
                break
    return found


def _take_turns(sizes: Sequence[int], are_blocks: Sequence[bool], num_fragments: int) -> list[int]:
    """The fragment of each unit: each goes to the smallest one, the large ones that are no blocks before the blocks."""
    filled = [(0, 0)] * num_fragments  # elements, units
    chosen = [0] * len(sizes)
    others = sorted((at for at, is_block in enumerate(are_blocks) if not is_block), key=lambda at: -sizes[at])
    for at in [*others, *(at for at, is_block in enumerate(are_blocks) if is_block)]:
        chosen[at] = filled.index(min(filled))
        elements, units = filled[chosen[at]]
        filled[chosen[at]] = (elements + sizes[at], units + 1)
    return chosen


def _neighbours(sizes: Sequence[int], num_fragments: int) -> list[int]:
    """The fragment of each unit: the cut into stretches, none empty, with the least sum of squared sizes."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    # best[units]: the least sum for the first `units` units in as many stretches as were looked at, and where they end.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for stretches in range(1, num_fragments + 1):
        best = {
            units: min(
                (best[cut][0] + (ends[units] - ends[cut]) ** 2, [*best[cut][1], units])
                for cut in range(stretches - 1, units)
                if cut in best
            )
            for units in range(stretches, len(sizes) + 1)
        }
    cuts = best[len(sizes)][1]
    return [next(each for each, end in enumerate(cuts) if at < end) for at in range(len(sizes))]
