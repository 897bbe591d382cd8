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

    def __init__(self, loader: Loader, output: Path, stack: list[tuple[NodeKey, Place]] | None = None) -> None:
        self.loader = loader
        self.output = output
        self.instances: dict[str, Namespace] = {}
        self.stack: list[tuple[NodeKey, Place]] = [] if stack is None else stack

    @contextmanager
    def entered(self, key: NodeKey, place: Place) -> Iterator[None]:
        """Marks a place as being resolved. Raises Problems with the chain of places when it already is."""
        if any(other == key for other, _ in self.stack):
            start = next(i for i, (other, _) in enumerate(self.stack) if other == key)
            chain = [*self.stack[start:], (key, self.stack[start][1])]
            shown = " -> ".join(f"{other} ({where})" for other, where in chain)
            raise problem(chain[0][1], f"a circle: {shown}", fix="break it at one of these places")
        self.stack.append((key, place))
        try:
            yield
        finally:
            self.stack.pop()


class Reached(NamedTuple):
    """What a path leads to: a node, how many steps remain behind it, and the parameters read on the way."""

    node: Node
    remaining: int
    used: frozenset[Used]
