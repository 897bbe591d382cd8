"""What the resolution of a graph shares and returns, and what stops it from going in circles."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from forgather.config.inherit import Loader
from forgather.config.nodes import Node, NodeKey, Used
from forgather.config.problems import problem
from forgather.config.tree import Place, Plain

if TYPE_CHECKING:
    from forgather.config.resolve import Namespace


class Supplied(NamedTuple):
    """A parameter's value from outside of the config, and where it was written."""

    value: Plain
    place: Place


class Context:
    """What the namespaces of one graph share."""

    def __init__(self, loader: Loader, output: Path, stack: list[tuple[NodeKey, Place, bool]] | None = None) -> None:
        self.loader = loader
        self.output = output
        self.instances: dict[str, Namespace] = {}
        self.stack: list[tuple[NodeKey, Place, bool]] = [] if stack is None else stack

    @contextmanager
    def entered(self, key: NodeKey, place: Place, *, is_way: bool = False) -> Iterator[None]:
        """Marks a place as being resolved, or (`is_way`) a reference as being followed on the way to a part.

        Raises Problems with the chain of places when it already is.
        """
        entry = (key, place, is_way)
        start = next((i for i, (other, _, way) in enumerate(self.stack) if (other, way) == (key, is_way)), None)
        if start is not None:
            shown = " -> ".join(f"{other} ({where})" for other, where, _ in [*self.stack[start:], entry])
            raise problem(self.stack[start][1], f"a circle: {shown}", fix="break it at one of these places")
        self.stack.append(entry)
        try:
            yield
        finally:
            self.stack.pop()


class Reached(NamedTuple):
    """What a path leads to: a node, how many steps remain behind it, and the parameters read on the way."""

    node: Node
    remaining: int
    used: frozenset[Used]
