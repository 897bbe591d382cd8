"""Builds objects from the graph. What is built lives in a session, never on the graph.

Arguments are built in written order, depth first, at first visit. Whatever this file does, the Python that `emit`
writes does too: that is the reference, and a property test compares them.
"""

import functools
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from forgather.config.expressions import Chain, late_path
from forgather.config.nodes import (
    Argument,
    Call,
    Constant,
    Container,
    Entries,
    Function,
    Given,
    Node,
    NodeKey,
    Part,
    Reference,
    Symbol,
    Template,
)
from forgather.config.plain import fresh, is_plain
from forgather.config.problems import problem, too_deep
from forgather.config.specs import import_spec

_NOTE = "while building "
_MANY_LEVELS = 150  # a third to a half of what Python's recursion limit allows


class Frame:
    """What one call of a function has made so far; the outermost frame is the session's own."""

    __slots__ = ("arguments", "captured", "made")

    def __init__(self, captured: Mapping[NodeKey, Any], arguments: Mapping[str, Any]) -> None:
        self.made: dict[NodeKey, Any] = {}
        self.captured = captured
        self.arguments = arguments


class Builder:
    """Builds nodes; singletons once. `given` holds the objects of given targets by name."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.frame = Frame({}, {})
        self.chain: list[str] = []

    def build(self, node: Node) -> Any:
        """The object of a node. What a constructor raises leaves with a note of place, SPEC and chain of keys."""
        try:
            return self._visit(node, self.frame)
        except RecursionError as error:
            levels = sum(frame.f_code.co_name == "_visit" for frame, _ in traceback.walk_tb(error.__traceback__))
            if levels < _MANY_LEVELS:  # a constructor's own recursion
                raise
            raise too_deep(node.place) from None

    def _visit(self, node: Node, frame: Frame) -> Any:
        match node:
            case Constant():
                return fresh(node.value)
            case Reference():
                return frame.captured[node.key] if node.key in frame.captured else self._visit(node.target, frame)
            case Call(kind="factory"):
                return self._call(node, frame)
            case Call() | Function():
                if node.key not in frame.made:
                    made = self._call(node, frame) if isinstance(node, Call) else self._function(node, frame)
                    frame.made[node.key] = made
                return frame.made[node.key]
            case Container():
                items = [self._visit(item, frame) for item in node.items]
                if node.kind == "tuple":
                    return tuple(items)
                return items if node.kind == "list" else [item for item in items if item is not None]
            case Entries():
                return {name: self._visit(item, frame) for name, item in node.items}
            case Symbol():
                return import_spec(node.spec, node.place)
            case Template():
                return self._template(node, frame)
            case Given():
                return self.given[node.name]
            case Argument():
                return frame.arguments[node.name]
            case Part():
                return self._part(node, frame)
        raise AssertionError(f"no rule builds a {type(node).__name__}")

    def _call(self, node: Call, frame: Frame) -> Any:
        with self._noting(node):
            function = import_spec(node.spec, node.place)
            positional: list[Any] = []
            keywords: dict[str, Any] = {}
            for name, argument in node.arguments:
                value = self._visit(argument, frame)
                if name is None:
                    positional.append(value)
                elif name == "*":
                    positional.extend(value)
                else:
                    keywords[name] = value
            if node.kind == "partial":
                return functools.partial(function, *positional, **keywords)
            return function(*positional, **keywords)

    def _function(self, node: Function, frame: Frame) -> Callable[..., Any]:
        captured = {each.key: self._visit(each, frame) for each in node.captures}
        params, name = node.body.params, str(node.key.path[-1])

        def function(*positional: Any, **keywords: Any) -> Any:
            arguments = bind_params(name, params, positional, keywords)
            return self._visit(node.result, Frame(captured, arguments))

        function.__name__ = function.__qualname__ = name
        return function

    def _template(self, node: Template, frame: Frame) -> Any:
        operands: dict[Chain, Any] = {}
        for chain, operand, length in node.operands:
            operands[chain] = (self._visit(operand, frame), length)

        def meaning(chain: Chain) -> Any:
            if chain not in operands:
                return fresh(node.values[chain])
            value, length = operands[chain]
            for step in chain.steps[length:]:
                value = getattr(value, str(step.key)) if step.is_dotted else value[step.key]
            return value

        parts = [
            part if isinstance(part, str) else part.evaluate(meaning, late_path, is_late=True) for part in node.parts
        ]
        value = parts[0] if len(parts) == 1 else "".join(format(each) for each in parts)
        if not is_plain(value):
            fix = "an expression computes plain data; refer to an object by !ref"
            raise problem(node.place, f"the expression gave a {type(value).__name__}", fix=fix)
        return value

    def _part(self, node: Part, frame: Frame) -> Any:
        value = self._visit(node.base, frame)
        for step in node.steps:
            try:
                value = getattr(value, str(step.key)) if step.is_dotted else value[step.key]
            except (AttributeError, LookupError, TypeError) as error:
                raise problem(node.place, f"{step.key!r} of what was given: {error}") from error
        return value

    @contextmanager
    def _noting(self, node: Call) -> Iterator[None]:
        self.chain.append(str(node.key))
        try:
            yield
        except BaseException as error:
            # Only the innermost constructor's note: the chain names those around it.
            if building_note(error) is None:
                error.add_note(f"{_NOTE}{' -> '.join(self.chain)}: {node.spec} ({node.place}){_given_by_words(node)}")
            raise
        finally:
            self.chain.pop()


def building_note(error: BaseException) -> str | None:
    """What was being built when `error` was raised: the chain of keys, SPEC and place. None outside of building."""
    return next((note for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE)), None)


def _given_by_words(node: Call) -> str:
    """Which arguments of a call come from the command line or a Python call, and not from the place of the call."""
    values = [each.target if isinstance(each, Reference) else each for _, each in node.arguments]
    words = dict.fromkeys(str(value.place) for value in values if value.place.line == 0)
    return f", given {', '.join(words)}" if words else ""


def bind_params(
    name: str, params: tuple[str, ...], positional: tuple[Any, ...], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a `!function` by name. Raises TypeError as Python does."""
    if len(positional) > len(params):
        raise TypeError(f"{name}() takes {len(params)} positional arguments but {len(positional)} were given")
    bound = dict(zip(params, positional, strict=False))
    for key, value in keywords.items():
        if key not in params:
            raise TypeError(f"{name}() got an unexpected keyword argument {key!r}")
        if key in bound:
            raise TypeError(f"{name}() got multiple values for argument {key!r}")
        bound[key] = value
    missing = [each for each in params if each not in bound]
    if missing:
        raise TypeError(f"{name}() missing required arguments: {', '.join(missing)}")
    return bound
