"""Whether the arguments that YAML writes fit the signature of what they are for, without calling it."""

import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from forgather.config.names import did_you_mean
from forgather.config.nodes import Call, Constant, Node
from forgather.config.plain import NotPlainError, plain_value
from forgather.config.problems import Collector
from forgather.config.tree import Key, Place

_PLAIN_TYPES: tuple[type, ...] = (bool, int, float, str, list, dict, tuple, type(None))


def bind(call: Call, function: Callable[..., Any], problems: Collector) -> None:
    """Adds a problem for each argument that the signature does not take, lacks, or would take of another type."""
    signature = _signature(function)
    if signature is None:
        return
    parameters = list(signature.parameters.values())
    in_turn = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    by_name = {each.name: each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    has_list = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    has_mapping = any(each.kind is each.VAR_KEYWORD for each in parameters)
    positional, is_exact = _positional(call)
    for index, node in enumerate(positional):
        if index < len(in_turn):
            _check_type(call, in_turn[index], node, problems)
        elif not has_list:
            takes = f"takes {len(in_turn)} positional arguments, not {len(positional)}"
            problems.add(node.place, f"{call.spec} {takes}", fix=f"its arguments: {signature}")
            break
    filled = {each.name for each in in_turn[: len(positional)]}
    for name, node in call.arguments:
        if name is None or name == "*":
            continue
        place = name.place if isinstance(name, Key) else node.place
        parameter = by_name.get(name)
        if parameter is not None:
            if name in filled and parameter.kind is not parameter.POSITIONAL_ONLY:
                problems.add(place, f"the argument {str(name)!r} of {call.spec} is given by position, too")
            filled.add(parameter.name)
            _check_type(call, parameter, node, problems)
        elif not has_mapping:
            fix = did_you_mean(name, by_name, what="its arguments")
            problems.add(place, f"unknown argument {str(name)!r} of {call.spec}", fix=fix)
    if call.kind != "partial" and is_exact:
        required = [each for each in (*in_turn, *by_name.values()) if each.default is each.empty]
        missing = list(dict.fromkeys(each.name for each in required if each.name not in filled))
        if missing:
            names = ", ".join(missing)
            problems.add(call.place, f"{call.spec} lacks {names}", fix=f"write {missing[0]}: VALUE below it")


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function, eval_str=True)
    except (NameError, AttributeError, SyntaxError, ImportError):
        pass  # annotations that name what only a type checker sees; the names of the arguments still count
    except (TypeError, ValueError):
        return None
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None  # a builtin that does not tell


def _positional(call: Call) -> tuple[list[Node], bool]:
    """The positional arguments that are known, and whether these are all."""
    nodes: list[Node] = []
    for name, node in call.arguments:
        if name is None:
            nodes.append(node)
        elif name == "*":
            if not isinstance(node, Constant):
                return nodes, False
            assert isinstance(node.value, list | tuple), "resolving took nothing else"
            nodes += [Constant(node.key, node.place, node.scope, item) for item in node.value]
    return nodes, True


def _check_type(call: Call, parameter: inspect.Parameter, node: Node, problems: Collector) -> None:
    try:
        value = plain_value(node, set())
    except NotPlainError:
        return
    if value is None and parameter.default is None:
        return
    allowed = _allowed(parameter.annotation)
    if allowed is None or any(_is_a(value, each) for each in allowed):
        return
    names = " or ".join(_name(each) for each in allowed)
    place: Place = node.place
    message = f"the argument {parameter.name!r} of {call.spec} is {names}, not {value!r}"
    problems.add(place, message, fix=f"write {names}")


def _allowed(annotation: Any) -> list[Any] | None:
    """The plain types and literals that an annotation allows; None when it allows anything else, too."""
    if annotation is None:
        return [type(None)]
    if annotation in _PLAIN_TYPES if isinstance(annotation, type) else False:
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (list, dict, tuple):
        return [origin]
    if origin is typing.Literal:
        return [_Literal(typing.get_args(annotation))]
    if origin in (typing.Union, types.UnionType):
        found: list[Any] = []
        for each in typing.get_args(annotation):
            allowed = _allowed(each)
            if allowed is None:
                return None
            found += allowed
        return found
    return None


class _Literal:
    def __init__(self, values: Iterable[Any]) -> None:
        self.values = tuple(values)


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(kind, _Literal):
        return value in kind.values
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is tuple:  # YAML has lists where Python has tuples; most functions take either
        return isinstance(value, list | tuple)
    return isinstance(value, kind)


def _name(kind: Any) -> str:
    if isinstance(kind, _Literal):
        return ", ".join(repr(value) for value in kind.values)
    return "null" if kind is type(None) else str(kind.__name__)
