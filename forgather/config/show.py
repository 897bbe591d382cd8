"""The resolved configuration as text: for reading and for `diff`. Not meant to be read back in."""

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from forgather.config.nested import projects
from forgather.config.nodes import Constant, KeyPath, Scope, Used
from forgather.config.paths import format_path
from forgather.config.reach import reference_steps
from forgather.config.scalars import AmbiguousScalarError, read_plain
from forgather.config.tree import ListValue, MappingValue, Place, Plain, Scalar, Tag, Value, literal

if TYPE_CHECKING:
    from forgather.config.resolve import Namespace


def show(namespace: "Namespace", targets: list[str], *, with_args: bool, origin: bool) -> str:
    """The targets as YAML, expressions replaced by their values where they have one before building.

    With `origin` each line ends in the place that it was written at and, behind `<-`, where the parameters that its
    expression reads got their values. Raises Problems.
    """
    printer = _Printer(namespace)
    if with_args and namespace.config.declarations:
        printer.line("args:", None, 0)
        for name in namespace.config.declarations:
            place = namespace.parameter_place(name) or Place("")
            printer.value(("args", name), str(name), literal(namespace.value(name), place), 1, None)
    for name in targets:
        printer.value((name,), name, namespace.tree.items[namespace.tree.key(name)], 0, None)
    return printer.text(origin)


def digest(namespace: "Namespace") -> str:
    """A hash of the resolved config and of every other project that it names."""
    return _digest(namespace, set())


def _digest(namespace: "Namespace", told: set[str]) -> str:
    told.add(namespace.key)
    names = [str(name) for name in namespace.tree]
    texts = [str(namespace.config.path.name), show(namespace, names, with_args=True, origin=False)]
    for path, value in projects((), namespace.tree):
        other = namespace.instance(path, value, None)
        if other.key not in told:  # projects may name one another
            texts.append(_digest(other, told))
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).hexdigest()


class _Printer:
    def __init__(self, namespace: "Namespace") -> None:
        self.namespace = namespace
        self.lines: list[tuple[str, str]] = []

    def line(self, text: str, place: Place | None, depth: int, used: Iterable[Used] = ()) -> None:
        origin = str(place or "")
        sources = self.sources(used)
        self.lines.append(("  " * depth + text, f"{origin} <- {', '.join(sources)}" if sources else origin))

    def text(self, origin: bool) -> str:
        if not origin:
            return "".join(f"{text}\n" for text, _ in self.lines)
        width = min(72, max((len(text) for text, _ in self.lines), default=0))
        return "".join(f"{text:<{width}}  # {origin_}\n" if origin_ else f"{text}\n" for text, origin_ in self.lines)

    def sources(self, used: Iterable[Used]) -> list[str]:
        """The places that gave the parameters their values, each once."""
        found: dict[str, None] = {}
        for each in sorted(used, key=lambda each: (each.place, each.namespace, each.name)):
            namespace = self.namespace
            if each.namespace != namespace.key:
                namespace = namespace.context.instances[each.namespace]
            found[str(namespace.parameter_place(each.name))] = None
        return list(found)

    def value(self, path: KeyPath, key: str | None, value: Value, depth: int, scope: Scope | None) -> None:
        """One value behind `key:`, or behind a dash when it is a list's item."""
        value, used = self.resolved(path, value, scope)
        head = "-" if key is None else f"{key_text(key)}:"
        tag = f" {value.tag}" if value.tag else ""
        inner = self.inner_scope(path, value, scope)
        if isinstance(value, MappingValue) and value.items:
            self.line(head + tag, value.place, depth, used)
            for name, item in value.items.items():
                below = inner if name == "result" else scope
                self.value((*path, str(name)), str(name), item, depth + 1, below)
        elif isinstance(value, ListValue) and value.items:
            self.line(head + tag, value.place, depth, used)
            for index, item in enumerate(value.items):
                self.value((*path, index), None, item, depth + 1, scope)
        else:
            self.line(f"{head}{tag}{_inline(value)}", value.place, depth, used)

    def inner_scope(self, path: KeyPath, value: Value, scope: Scope | None) -> Scope | None:
        is_function = value.tag is not None and value.tag.name == "function"
        return self.namespace.body(path, value, scope) if is_function else scope

    def resolved(self, path: KeyPath, value: Value, scope: Scope | None) -> tuple[Value, Iterable[Used]]:
        """The value with its expressions replaced where they can be, and the parameters that they read."""
        if not isinstance(value, Scalar) or not isinstance(value.content, str) or "${" not in value.content:
            return value, ()
        if value.is_literal:
            return value, ()
        if value.tag == Tag("ref"):
            steps, used = reference_steps(self.namespace, path, value, scope)
            return Scalar(format_path(step.key for step in steps), value.place, value.tag), used
        if value.tag is None:
            node = self.namespace.node(path, value, scope)
            if isinstance(node, Constant):
                return literal(node.value, value.place), node.used
            return value, node.used
        return value, ()


def _inline(value: Value) -> str:
    if isinstance(value, MappingValue):
        return " {}"
    if isinstance(value, ListValue):
        return " []"
    assert isinstance(value, Scalar), "the three kinds of value"
    if value.tag is not None:
        return f" {value.content}" if not value.is_empty else ""
    return f" {scalar_text(value.content)}"


def key_text(key: str) -> str:
    """A key as the reader takes it: keys are text, so fewer of them need quotes than values do."""
    is_simple = bool(key) and key.isascii() and key.replace("_", "").replace(".", "").isalnum()
    return key if is_simple else _quoted(key)


def scalar_text(value: Plain) -> str:
    """A scalar as the reader takes it for the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value).replace("inf", ".inf").replace("nan", ".nan")
    if not isinstance(value, str):
        return str(value)
    is_simple = value == value.strip() and value[:1].isalnum() | (value[:1] in "_/.~") and value.isprintable()
    try:
        if is_simple and read_plain(value) == value and not any(mark in f"{value} " for mark in (": ", " #")):
            return value
    except AmbiguousScalarError:
        pass
    return _quoted(value)


def _quoted(text: str) -> str:
    return f'"{"".join(_escaped(character) for character in text)}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    number = ord(character)
    return {"\n": "\\n", "\t": "\\t"}.get(character) or (f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}")
