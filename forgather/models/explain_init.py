"""Which rule gives each parameter of a model its first values."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import groupby

from torch import nn

from forgather.models.parts.initializers import Initializer
from forgather.models.parts.rules import assign


@dataclass(frozen=True)
class Explained:
    """A parameter, the pattern that was found first in its name, and what that rule fills it with.

    `pattern` and `initializer` are None for a parameter without a rule, which is an error to initialise.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    initializer: str | None


def explain_init(model: nn.Module, rules: Mapping[str, Initializer]) -> list[Explained]:
    """Each parameter once, in the order of the model; a tied one by the name that it has first."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assignment = assign(rules, shapes)
    explained = []
    for name, shape in shapes.items():
        initializer = _written(assignment.chosen[name]) if name in assignment.chosen else None
        explained.append(Explained(name, shape, assignment.pattern.get(name), initializer))
    return explained


def describe_init(explained: Sequence[Explained]) -> list[str]:
    """Lines of a table in which layers that differ by their number alone share a line."""
    rows = [("parameter", "shape", "rule", "initializer")]
    for group in _alike(explained):
        first = group[0]
        rows.append(
            (
                _numbered([each.name for each in group]),
                str(list(first.shape)),
                first.pattern or "none",
                first.initializer or "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _written(initializer: object) -> str:
    """`Normal(std=0.02, mean=0.0)`: without what says nothing of the values."""
    if not is_dataclass(initializer):  # one of a user's own
        return repr(initializer)
    values = {field.name: getattr(initializer, field.name) for field in fields(initializer)}
    values.pop("may_match_nothing", None)
    shown = (f"{name}={_value(value)}" for name, value in values.items() if value is not None)
    return f"{type(initializer).__name__}({', '.join(shown)})"


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _written(value)


def _alike(explained: Iterable[Explained]) -> list[list[Explained]]:
    """Those whose names differ by a number alone and that have shape and rule in common, first come first."""
    groups: dict[object, list[Explained]] = {}
    for each in explained:
        key = (re.sub(r"\d+", "#", each.name), each.shape, each.pattern, each.initializer)
        groups.setdefault(key, []).append(each)
    return list(groups.values())


def _numbered(names: list[str]) -> str:
    """`layers.0.mlp`, `layers.1.mlp`, `layers.3.mlp` -> `layers.{0-1,3}.mlp`."""
    if len(names) == 1:
        return names[0]
    pieces = [re.split(r"(\d+)", name) for name in names]
    written = []
    for column in zip(*pieces, strict=True):
        distinct = list(dict.fromkeys(column))
        written.append(distinct[0] if len(distinct) == 1 else f"{{{_runs([int(number) for number in distinct])}}}")
    return "".join(written)


def _runs(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> `0-2,5`."""
    runs = []
    for _, members in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in members]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(runs)
