"""A session: what was built, for as long as its singletons are to be shared."""

from collections.abc import Mapping, Sequence
from typing import Any

from forgather.config.build import Builder
from forgather.config.check import check_nodes
from forgather.config.nodes import Node, walk
from forgather.config.problems import Collector, problem
from forgather.config.resolve import Namespace
from forgather.config.tree import Place


class Session:
    """Builds targets of one config. Singletons are built once, and `None` counts as built.

    Targets can be given instead of built, as long as nothing that was built already has reached them.
    """

    def __init__(self, namespace: Namespace, given: Mapping[str, Any]) -> None:
        self._namespace = namespace
        self._given: dict[str, Any] = {}
        self._builder = Builder(self._given)
        self._reached: set[str] = set()
        self._give(given)

    def build(self, target: str | Sequence[str], given: Mapping[str, Any] | None = None) -> Any:
        """The object of a target, or a list with those of several. Raises ConfigError before anything is built."""
        self._give(given or {})
        names = [target] if isinstance(target, str) else list(target)
        problems = Collector()
        nodes: list[Node] = []
        for name in names:
            with problems.collecting():
                nodes.append(self._namespace.target(name))
        problems.raise_any()
        check_nodes(nodes, problems)
        problems.raise_any()
        self._reached |= {str(node.key.path[0]) for node in walk(nodes) if node.key.namespace == self._namespace.key}
        built = [self._builder.build(node) for node in nodes]
        return built[0] if isinstance(target, str) else built

    def _give(self, given: Mapping[str, Any]) -> None:
        new = {name: value for name, value in given.items() if name not in self._given}
        for name, value in given.items():
            if name in self._given and self._given[name] is not value:
                raise problem(None, f"the target {name!r} was given another object before", fix="use a new session")
            if name in self._reached and name not in self._given:
                fix = "give it before, or use a new session"
                raise problem(None, f"the target {name!r} is given, but what was built already reached it", fix=fix)
        if new:
            self._namespace = self._namespace.giving([*self._given, *new], Place("given"))
            self._given.update(new)
