"""The graph that a resolved configuration is: immutable, without cycles, each node with its key and place.

A node's `key` is (namespace, path): its identity in sessions and in emitted code. Its `scope` is the function in whose
body it is written, None outside of all. References are nodes of their own, since each place that refers to a factory
or to plain data gets a new one.
"""

from collections.abc import Iterator
from typing import NamedTuple

from forgather.config.expressions import Chain, Expression
from forgather.config.paths import Step, format_path
from forgather.config.specs import Spec
from forgather.config.tree import Place, Plain

KeyPath = tuple[str | int, ...]


class NodeKey(NamedTuple):
    """Which node: `namespace` is empty for the selected project, and names the instance of another."""

    namespace: str
    path: KeyPath

    def __str__(self) -> str:
        return format_path(self.path)


class Used(NamedTuple):
    """A parameter whose value went into a node."""

    namespace: str
    name: str
    place: Place


class Scope:
    """The body of one `!function`."""

    __slots__ = ("key", "params", "parent")

    def __init__(self, key: NodeKey, params: tuple[str, ...], parent: "Scope | None") -> None:
        self.key = key
        self.params = params
        self.parent = parent

    def is_within(self, other: "Scope | None") -> bool:
        """True when this body is `other`, or lies inside it. Everything lies inside None."""
        here: Scope | None = self
        while here is not None and here is not other:
            here = here.parent
        return here is other


def within(scope: Scope | None, other: Scope | None) -> bool:
    return other is None if scope is None else scope.is_within(other)


class Node:
    """One node. Subclasses say what it becomes."""

    __slots__ = ("key", "place", "scope", "used")

    def __init__(self, key: NodeKey, place: Place, scope: Scope | None, used: frozenset[Used] = frozenset()) -> None:
        self.key = key
        self.place = place
        self.scope = scope
        self.used = used

    def children(self) -> Iterator["Node"]:
        """What is written inside, in order. A reference's target is not."""
        return iter(())


class Constant(Node):
    """Plain data. A container among it is fresh at each place that refers to it."""

    __slots__ = ("value",)

    def __init__(
        self, key: NodeKey, place: Place, scope: Scope | None, value: Plain, used: frozenset[Used] = frozenset()
    ) -> None:
        super().__init__(key, place, scope, used)
        self.value = value


class Source(Constant):
    """The Python of other targets. `roots` are what it builds: where it will run, nobody can say what is wrong."""

    __slots__ = ("roots",)

    def __init__(
        self,
        key: NodeKey,
        place: Place,
        scope: Scope | None,
        text: str,
        used: frozenset[Used],
        roots: tuple[Node, ...],
    ) -> None:
        super().__init__(key, place, scope, text, used)
        self.roots = roots


class Given(Node):
    """A target that is handed in instead of built."""

    __slots__ = ("name",)

    def __init__(self, key: NodeKey, place: Place, name: str) -> None:
        super().__init__(key, place, None)
        self.name = name


class Argument(Node):
    """A parameter of a `!function`."""

    __slots__ = ("name",)

    def __init__(self, key: NodeKey, place: Place, scope: Scope, name: str) -> None:
        super().__init__(key, place, scope)
        self.name = name


class Container(Node):
    """A list, a tuple, or the values of a mapping without its Nones; always fresh."""

    __slots__ = ("items", "kind")

    def __init__(self, key: NodeKey, place: Place, scope: Scope | None, kind: str, items: tuple[Node, ...]) -> None:
        super().__init__(key, place, scope)
        self.kind = kind  # list, tuple or values
        self.items = items

    def children(self) -> Iterator[Node]:
        return iter(self.items)


class Entries(Node):
    """A mapping; always fresh."""

    __slots__ = ("items",)

    def __init__(self, key: NodeKey, place: Place, scope: Scope | None, items: tuple[tuple[str, Node], ...]) -> None:
        super().__init__(key, place, scope)
        self.items = items

    def children(self) -> Iterator[Node]:
        return (item for _, item in self.items)


class Call(Node):
    """`!singleton`, `!factory` or `!partial`. An argument's name is None for a positional, "*" for a list of them."""

    __slots__ = ("arguments", "kind", "spec")

    def __init__(
        self,
        key: NodeKey,
        place: Place,
        scope: Scope | None,
        kind: str,
        spec: Spec,
        arguments: tuple[tuple[str | None, Node], ...],
    ) -> None:
        super().__init__(key, place, scope)
        self.kind = kind
        self.spec = spec
        self.arguments = arguments

    def children(self) -> Iterator[Node]:
        return (argument for _, argument in self.arguments)


class Symbol(Node):
    """The named thing itself."""

    __slots__ = ("spec",)

    def __init__(self, key: NodeKey, place: Place, scope: Scope | None, spec: Spec) -> None:
        super().__init__(key, place, scope)
        self.spec = spec


class Function(Node):
    """A function. `captures` are the references in its body to what is outside, built before it, once."""

    __slots__ = ("body", "captures", "result")

    def __init__(self, key: NodeKey, place: Place, scope: Scope | None, body: Scope, result: Node) -> None:
        super().__init__(key, place, scope)
        self.body = body
        self.result = result
        self.captures = tuple(_captures(result, body))

    def children(self) -> Iterator[Node]:
        yield self.result


class Reference(Node):
    """The node at another place."""

    __slots__ = ("target",)

    def __init__(
        self, key: NodeKey, place: Place, scope: Scope | None, target: Node, used: frozenset[Used] = frozenset()
    ) -> None:
        super().__init__(key, place, scope, used)
        self.target = target


class Part(Node):
    """An attribute or item of something given."""

    __slots__ = ("base", "steps")

    def __init__(self, key: NodeKey, place: Place, scope: Scope | None, base: Node, steps: tuple[Step, ...]) -> None:
        super().__init__(key, place, scope)
        self.base = base
        self.steps = steps

    def children(self) -> Iterator[Node]:
        yield self.base


class Template(Node):
    """A scalar whose expressions are evaluated while building.

    `parts` are texts and expressions in turn; a single expression keeps its type. `operands` gives each chain that is
    not plain the node it begins with, and how many of its steps that node stands for; `values` the plain ones' values.
    """

    __slots__ = ("operands", "parts", "values")

    def __init__(
        self,
        key: NodeKey,
        place: Place,
        scope: Scope | None,
        parts: tuple[str | Expression, ...],
        operands: tuple[tuple[Chain, Node, int], ...],
        values: dict[Chain, Plain],
        used: frozenset[Used],
    ) -> None:
        super().__init__(key, place, scope, used)
        self.parts = parts
        self.operands = operands
        self.values = values

    def children(self) -> Iterator[Node]:
        return (operand for _, operand, _ in self.operands)


def walk(roots: list[Node]) -> Iterator[Node]:
    """Every node that is reached, each once, references followed, in order of first visit."""
    seen: set[int] = set()
    pending = list(reversed(roots))
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        below = [node.target] if isinstance(node, Reference) else list(node.children())
        pending.extend(reversed(below))


def _captures(node: Node, body: Scope) -> Iterator[Reference]:
    if isinstance(node, Reference):
        if not within(node.target.scope, body) and not isinstance(node.target, Given):
            yield node
        return
    for child in node.children():
        yield from _captures(child, body)
