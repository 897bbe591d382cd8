"""Checks what can be known without building: every SPEC is imported, every argument bound to its signature."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from forgather.config.files import shipped_configs
from forgather.config.nested import projects
from forgather.config.nodes import Call, KeyPath, Node, Source, Symbol, walk
from forgather.config.problems import Collector, Problem
from forgather.config.signatures import bind
from forgather.config.specs import import_spec
from forgather.config.tree import MappingValue, Value

if TYPE_CHECKING:
    from forgather.config.resolve import Namespace


def check_nodes(roots: Iterable[Node], problems: Collector) -> None:
    """Imports the SPECs that are reached from the roots, also by way of `!code`, and binds their arguments."""
    for node in walk(list(roots)):
        if isinstance(node, Source):
            check_nodes(node.roots, problems)
        if not isinstance(node, Call | Symbol):
            continue
        with problems.collecting():
            found = import_spec(node.spec, node.place)
            if isinstance(node, Symbol):
                continue
            if callable(found):
                bind(node, found, problems)
            else:
                fix = "write !symbol: for the thing itself"
                problems.add(
                    node.place, f"{node.spec} is of type {type(found).__name__}, which cannot be called", fix=fix
                )


def check_config(namespace: "Namespace") -> list[Problem]:
    """Checks every target of a config; returns notes: what is odd but not wrong. Raises Problems with all at once."""
    problems = Collector()
    roots: list[Node] = []
    for name, value in namespace.tree.items.items():
        _resolve((str(name),), value, namespace, roots, problems)
    for parameter, declaration in namespace.config.declarations.items():
        if parameter in namespace.arguments or declaration.default is not None:
            with problems.collecting():
                namespace.value(parameter)
    check_nodes(roots, problems)
    for node in walk(roots):
        if isinstance(node, Call | Symbol) and _is_private(node.spec.module, node.spec.symbol):
            _refuse_shipped(node, problems)
    lacking = dict.fromkeys(each for each in problems.found if each.lacks_argument)
    problems.found = [each for each in problems.found if each not in lacking]
    problems.raise_any()
    if lacking:  # what depends on them was not resolved, so nothing is known of what is used, either
        return [each._replace(message=f"{each.message}: what needs it was not checked") for each in lacking]
    return [
        Problem(declaration.place, f"the parameter {name!r} is never used", "remove it, or read it by ${...}")
        for name, declaration in namespace.config.declarations.items()
        if name not in namespace.read_parameters
    ]


def _resolve(path: KeyPath, value: Value, namespace: "Namespace", roots: list[Node], problems: Collector) -> None:
    """Adds the nodes of a target to `roots`. A private mapping may hold projects to choose from: no objects."""
    with problems.collecting():
        if value.tag is not None and value.tag.name == "project":
            namespace.instance(path, value, None)
        elif _is_choice(path, value):
            assert isinstance(value, MappingValue), "a choice is a mapping"
            for key, item in value.items.items():
                _resolve((*path, str(key)), item, namespace, roots, problems)
        else:
            roots.append(namespace.node(path, value, None))


def _is_choice(path: KeyPath, value: Value) -> bool:
    is_mapping = isinstance(value, MappingValue) and value.tag is None
    return is_mapping and str(path[0]).startswith("_") and any(projects(path, value))


def _is_private(module: str, symbol: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in (*module.split("."), *symbol.split(".")))


def _refuse_shipped(node: Call | Symbol, problems: Collector) -> None:
    if Path(node.place.file).is_relative_to(shipped_configs()):
        fix = "name its public alias: a private name may be gone with the next release"
        problems.add(node.place, f"shipped YAML names the private {node.spec}", fix=fix)
