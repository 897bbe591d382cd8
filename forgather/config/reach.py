"""Follows paths: what `a.b[0].c` leads to, through references and into other projects."""

from typing import TYPE_CHECKING

from forgather.config.context import Reached
from forgather.config.fold import fold
from forgather.config.names import did_you_mean
from forgather.config.nodes import (
    Argument,
    Constant,
    Container,
    Entries,
    KeyPath,
    Node,
    NodeKey,
    Reference,
    Scope,
    Used,
    within,
)
from forgather.config.paths import Step, format_path, parse_path
from forgather.config.plain import index_plain
from forgather.config.problems import Problems, problem
from forgather.config.tree import ListValue, MappingValue, Place, Scalar, Value

if TYPE_CHECKING:
    from forgather.config.resolve import Namespace


def reach(
    namespace: "Namespace", steps: tuple[Step, ...], place: Place, scope: Scope | None, *, in_expression: bool = False
) -> Reached:
    """Follows a path from where it is written. Raises Problems with the nearest name."""
    name = str(steps[0].key)
    function = scope
    while function is not None:
        if name in function.params:
            key = NodeKey(namespace.key, (*function.key.path, f"({name})"))
            return Reached(Argument(key, place, function, name), len(steps) - 1, frozenset())
        function = function.parent
    if name in namespace.given:
        return _inside(namespace.given[name], steps, place)
    if name in namespace.config.declarations:
        used = frozenset([Used(namespace.key, name, place)])
        namespace.read_parameters.add(name)
        value = index_plain(namespace.value(name), steps, place)
        return Reached(Constant(NodeKey(namespace.key, ("args", name)), place, None, value, used), 0, used)
    root = namespace.tree.get(name)
    if root is None:
        raise _unknown(namespace, name, place, scope)
    return _descend(namespace, (name,), root, None, steps[1:], place, scope, in_expression=in_expression)


def _inside(node: Node, steps: tuple[Step, ...], place: Place) -> Reached:
    """What a path leads to in a given target: below data that was written, its parts; below objects, their own."""
    used: set[Used] = set()
    for position, step in enumerate(steps[1:], 1):
        while isinstance(node, Reference):
            used |= node.used
            node = node.target
        used |= node.used
        shown = format_path(each.key for each in steps[:position])
        if isinstance(node, Constant):
            value = index_plain(node.value, (Step(shown), *steps[position:]), place)
            return Reached(Constant(node.key, node.place, node.scope, value, frozenset(used)), 0, frozenset(used))
        if isinstance(node, Entries):
            below = dict(node.items).get(str(step.key)) if isinstance(step.key, str) else None
            fix = did_you_mean(str(step.key), dict(node.items), what="its keys")
        elif isinstance(node, Container) and node.kind != "values":  # how many Nones are dropped is known when built
            is_item = isinstance(step.key, int) and -len(node.items) <= step.key < len(node.items)
            below = node.items[step.key] if is_item else None  # type: ignore[index]  # is_item tells
            fix = f"it has {len(node.items)} items; write {shown}[0] for the first"
        else:
            return Reached(node, len(steps) - position, frozenset(used))
        if below is None:
            raise problem(place, f"{shown!r}, given at {node.place}, has no {step.key!r}", fix=fix)
        node = below
    return Reached(node, 0, frozenset(used))


def _unknown(namespace: "Namespace", name: str, place: Place, scope: Scope | None) -> Problems:
    known = [*namespace.tree, *namespace.config.declarations, *namespace.given]
    while scope is not None:
        known += scope.params
        scope = scope.parent
    if name in ("project", "config"):
        return problem(place, f"{name!r} is known in expressions alone", fix=f"write ${{{name}.name}}")
    return problem(place, f"nothing is called {name!r}", fix=did_you_mean(name, known))


def _descend(
    namespace: "Namespace",
    path: KeyPath,
    value: Value,
    scope: Scope | None,
    steps: tuple[Step, ...],
    place: Place,
    viewer: Scope | None,
    *,
    in_expression: bool,
) -> Reached:
    """The node `steps` below the value at `path`, which is written in `scope`."""
    while steps:
        step = steps[0].key
        tag = value.tag.name if value.tag else None
        if tag == "ref":
            with namespace.context.entered(NodeKey(namespace.key, path), value.place, is_way=True):
                written, used = reference_steps(namespace, path, value, scope)
                reached = reach(namespace, (*written, *steps), value.place, scope, in_expression=in_expression)
            return reached._replace(used=reached.used | used)
        if tag == "project":
            other = namespace.instance(path, value, scope)
            reached = reach(other, steps, place, None, in_expression=in_expression)
            return reached._replace(used=reached.used | other.used)
        if tag == "function":
            body = namespace.body(path, value, scope)
            if step != "result" or not within(viewer, body):
                fix = "refer to the function, or move what is inside to a target of its own"
                raise problem(place, f"{format_path(path)!r} is a function; nothing inside it exists outside", fix=fix)
            scope = body
        below = _below(value, step) if tag not in ("code", "symbol") else None
        if below is None:
            return _beyond(namespace, path, value, scope, steps, place, in_expression=in_expression)
        index = step % len(value.items) if isinstance(step, int) and isinstance(value, ListValue) else step
        path, value, steps = (*path, index), below, steps[1:]
    return Reached(namespace.node(path, value, scope), 0, frozenset())


def _beyond(
    namespace: "Namespace",
    path: KeyPath,
    value: Value,
    scope: Scope | None,
    steps: tuple[Step, ...],
    place: Place,
    *,
    in_expression: bool,
) -> Reached:
    """A path that goes on where nothing more is written: into computed data, or into an object once it is built."""
    if value.is_template:
        node = namespace.node(path, value, scope)
        if isinstance(node, Constant):
            inside = index_plain(node.value, (Step(format_path(path)), *steps), place)
            return Reached(Constant(node.key, place, scope, inside, node.used), 0, node.used)
        if in_expression:
            return Reached(node, len(steps), frozenset())
    if value.is_call and in_expression:
        return Reached(namespace.node(path, value, scope), len(steps), frozenset())
    shown, step = format_path(path), steps[0].key
    what = f"{value.tag} " if value.tag else ""
    if isinstance(value, MappingValue):
        fix = did_you_mean(str(step), value.items, what="known there")
        if value.is_call:
            fix += "; an attribute of what is built is read by an expression"
    elif isinstance(value, ListValue):
        fix = f"it has {len(value.items)} items; write {shown}[0] for the first"
    else:
        fix = f"refer to {shown!r} itself"
    raise problem(place, f"{what}{shown!r} ({value.place}) has no {step!r}", fix=fix)


def reference_steps(
    namespace: "Namespace", path: KeyPath, value: Value, scope: Scope | None
) -> tuple[tuple[Step, ...], frozenset[Used]]:
    if not isinstance(value, Scalar) or value.is_empty:
        raise problem(value.place, "!ref needs a path", fix="write !ref name, !ref a.b or !ref xs[0]")
    used: set[Used] = set()
    text = str(value.content)
    if "${" in text and not value.is_literal:
        folded = fold(namespace, NodeKey(namespace.key, path), Scalar(text, value.place), scope)
        if not isinstance(folded, Constant):
            fix = "let it read parameters and plain values alone"
            raise problem(value.place, f"!ref {text}: where it leads must be known before building", fix=fix)
        text, used = str(folded.value), set(folded.used)
    try:
        return parse_path(text.strip()), frozenset(used)
    except ValueError as error:
        raise problem(value.place, f"!ref: {error}") from None


def _below(value: Value, step: str | int) -> Value | None:
    """What is written one step below a value, or None."""
    if isinstance(value, MappingValue) and isinstance(step, str):
        return value.get(step)
    if isinstance(value, ListValue) and isinstance(step, int) and -len(value.items) <= step < len(value.items):
        return value.items[step]
    return None
