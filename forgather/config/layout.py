"""Python expressions on paper: on one line when they fit, else one item a line."""

from typing import NamedTuple

WIDTH = 100
INDENT = "    "


class Item(NamedTuple):
    """One item of a bracket, with what stands before and behind it: `name=`, `*`, `'key': `."""

    before: str
    expression: "Layout"
    after: str = ""


class Bracket(NamedTuple):
    """`open item, item close`. `ends_with_comma` when a single item needs one, as in a tuple."""

    open: str
    items: tuple[Item, ...]
    close: str
    ends_with_comma: bool = False


Layout = str | Bracket


def flat(layout: Layout) -> str:
    """The expression on one line."""
    if isinstance(layout, str):
        return layout
    inside = ", ".join(f"{item.before}{flat(item.expression)}{item.after}" for item in layout.items)
    return f"{layout.open}{inside}{',' if layout.ends_with_comma else ''}{layout.close}"


def write(layout: Layout, indent: int = 0, taken: int = 0) -> str:
    """The expression, its first line `taken` columns in, further lines indented by `indent` steps."""
    line = flat(layout)
    if isinstance(layout, str) or not layout.items or len(INDENT) * indent + taken + len(line) <= WIDTH:
        return line
    inner = indent + 1
    lines = [
        f"{INDENT * inner}{item.before}{write(item.expression, inner, len(item.before) + 1)}{item.after},"
        for item in layout.items
    ]
    if len(layout.items) == 1 and layout.items[0].after:  # a comprehension takes no comma behind it
        lines = [lines[0][:-1]]
    return "\n".join([layout.open, *lines, f"{INDENT * indent}{layout.close}"])


def constant(value: object, float_name: str = "float") -> Layout:
    """Plain data as it is written in Python."""
    if isinstance(value, dict):
        return Bracket("{", tuple(Item(f"{key!r}: ", constant(item, float_name)) for key, item in value.items()), "}")
    if isinstance(value, list | tuple):
        items = tuple(Item("", constant(item, float_name)) for item in value)
        if isinstance(value, tuple):
            return Bracket("(", items, ")", ends_with_comma=len(items) == 1)
        return Bracket("[", items, "]")
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f"{float_name}({str(value)!r})"
    return repr(value)
