"""The node graph as a picture: Mermaid or DOT source."""

from collections.abc import Iterator, Mapping

from forgather.config.names import did_you_mean
from forgather.config.nodes import Call, Function, Given, Node, NodeKey, Reference, Symbol
from forgather.config.problems import problem, too_deep

FORMATS = ("mermaid", "dot")


def draw(roots: list[Node], projects: Mapping[str, str], format: str = "mermaid") -> str:
    """What each object is built from, reached from the roots; an edge is an argument.

    `projects` names the other projects that take part, by namespace. Raises Problems.
    """
    if format not in FORMATS:
        raise problem(None, f"unknown format {format!r}", fix=did_you_mean(format, FORMATS, what="formats"))
    drawing = _Drawing(projects)
    for root in roots:
        try:
            for node, _ in _objects(root, ""):
                drawing.add(node)
        except RecursionError:
            raise too_deep(root.place) from None
    return drawing.mermaid() if format == "mermaid" else drawing.dot()


class _Drawing:
    def __init__(self, projects: Mapping[str, str]) -> None:
        self.projects = projects
        self.numbers: dict[NodeKey, int] = {}
        self.labels: list[tuple[str, str]] = []
        self.edges: list[tuple[int, int, str]] = []

    def add(self, node: Node) -> int:
        if node.key in self.numbers:
            return self.numbers[node.key]
        number = self.numbers[node.key] = len(self.labels)
        project = self.projects.get(node.key.namespace)
        self.labels.append((f"{project}: {node.key}" if project else str(node.key), _kind(node)))
        children = node.arguments if isinstance(node, Call) else [("result", child) for child in node.children()]
        for name, child in children:
            for below, inside in _objects(child, name or ""):
                self.edges.append((number, self.add(below), inside))
        return number

    def mermaid(self) -> str:
        lines = ["graph LR"]
        for number, (name, kind) in enumerate(self.labels):
            lines.append(f'  n{number}["{_escaped(name)}<br/>{_escaped(kind)}"]')
        for start, end, label in self.edges:
            lines.append(f'  n{start} -->|"{_escaped(label)}"| n{end}' if label else f"  n{start} --> n{end}")
        return "\n".join(lines) + "\n"

    def dot(self) -> str:
        lines = ["digraph config {", "  rankdir=LR;", "  node [shape=box];"]
        for number, (name, kind) in enumerate(self.labels):
            lines.append(f'  n{number} [label="{_quoted(name)}\\n{_quoted(kind)}"];')
        for start, end, label in self.edges:
            lines.append(f'  n{start} -> n{end} [label="{_quoted(label)}"];')
        return "\n".join([*lines, "}"]) + "\n"


def _objects(node: Node, label: str) -> Iterator[tuple[Node, str]]:
    """The nearest nodes that are objects of their own, through references and containers."""
    if isinstance(node, Reference):
        yield from _objects(node.target, label)
    elif isinstance(node, Call | Function | Given | Symbol):
        yield node, label
    else:
        for child in node.children():
            yield from _objects(child, label)


def _kind(node: Node) -> str:
    if isinstance(node, Call):
        return f"!{node.kind}:{node.spec}"
    if isinstance(node, Symbol):
        return f"!symbol:{node.spec}"
    if isinstance(node, Function):
        return f"!function({', '.join(node.body.params)})"
    return "given"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
