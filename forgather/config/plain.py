"""Plain data: what YAML could have said itself."""

from typing import Any

from forgather.config.names import did_you_mean
from forgather.config.nodes import Constant, Container, Entries, Node, Reference, Used
from forgather.config.paths import Step, format_path
from forgather.config.problems import problem
from forgather.config.tree import Place, Plain


class NotPlainError(Exception):
    """A node that only building can give a value. `place` is the nearest one that is not plain."""

    def __init__(self, place: Place) -> None:
        super().__init__(str(place))
        self.place = place


def plain_value(node: Node, used: set[Used]) -> Plain:
    """The data that a node is, adding the parameters that went into it to `used`. Raises NotPlainError."""
    used |= node.used
    if isinstance(node, Constant):
        copied: Plain = fresh(node.value)
        return copied
    if isinstance(node, Reference):
        return plain_value(node.target, used)
    if isinstance(node, Entries):
        return {name: plain_value(item, used) for name, item in node.items}
    if isinstance(node, Container):
        values = [plain_value(item, used) for item in node.items]
        if node.kind == "tuple":
            return tuple(values)
        return values if node.kind == "list" else [value for value in values if value is not None]
    raise NotPlainError(node.place)


def fresh(value: Any) -> Any:
    """A copy of plain data whose containers are new."""
    if isinstance(value, dict):
        return {key: fresh(item) for key, item in value.items()}
    if isinstance(value, list):
        return [fresh(item) for item in value]
    return tuple(fresh(item) for item in value) if type(value) is tuple else value


def is_plain(value: Any) -> bool:
    """True for None, bools, numbers, text, and lists, tuples and dicts of them."""
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def index_plain(value: Plain, steps: tuple[Step, ...], place: Place) -> Plain:
    """What lies below `value` along `steps[1:]`; `steps[0]` is its name. Raises Problems with the nearest key."""
    for position, step in enumerate(steps[1:], 1):
        shown = format_path(each.key for each in steps[:position])
        if isinstance(value, dict) and isinstance(step.key, str):
            if step.key not in value:
                fix = did_you_mean(step.key, value, what="its keys")
                raise problem(place, f"{shown!r} has no {step.key!r}", fix=fix)
            value = value[step.key]
        elif isinstance(value, list | tuple) and isinstance(step.key, int):
            if not -len(value) <= step.key < len(value):
                raise problem(place, f"{shown!r} has {len(value)} items, no [{step.key}]")
            value = value[step.key]
        else:
            raise problem(place, f"{shown!r} is {value!r}, and nothing lies below it", fix=f"refer to {shown!r} itself")
    return value
