"""Declared parameters: their types, how declarations merge, and what values they accept.

`args` merges by its own rule: a mapping is always a declaration and merges key by key; anything else restates the
default, or declares a parameter whose type is its default's.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from forgather.config.names import did_you_mean, why_no_name
from forgather.config.problems import Collector, problem
from forgather.config.read import read_word
from forgather.config.tree import ListValue, MappingValue, Place, Plain, Scalar, Value

TYPES = ("int", "float", "str", "bool", "path", "yaml", "list")
_KEYS = ("type", "default", "choices", "min", "max", "pattern", "help")


class Declaration(NamedTuple):
    """What `args` says of one parameter, over all files. `type` is None when its default's type decides."""

    name: str
    place: Place
    type: str | None = None
    is_nullable: bool = False
    default: Value | None = None
    choices: tuple[Plain, ...] | None = None
    min: float | None = None
    max: float | None = None
    pattern: str | None = None
    help: str = ""
    bounded: Place | None = None  # where a file changed what values are accepted, and left the default as it was


class Parameter(NamedTuple):
    """A parameter of a selected config. `default` is its value before flags; `is_required` says that it has none."""

    name: str
    type: str
    is_nullable: bool
    default: Plain
    is_required: bool
    choices: tuple[Plain, ...] | None
    min: float | None
    max: float | None
    help: str
    place: Place

    def parse(self, text: str, word: str) -> Plain:
        """The value of this parameter that `text`, given by the flag `word`, means. Raises Problems."""
        if self.is_nullable and text in ("null", "~"):
            return None
        if self.type in ("str", "path"):
            return text
        return plain_data(read_word(text, word))


def declare(declarations: dict[str, Declaration], args: MappingValue | None, problems: Collector) -> None:
    """Merges the `args` of one file into what its parents declared."""
    for key, value in args.items.items() if args is not None else ():
        reason = why_no_name(key) or ("begins with _, and its flag with no letter" if key.startswith("_") else None)
        if reason is not None:
            problems.add(key.place, f"the parameter {str(key)!r} {reason}", fix="choose another name")
            continue
        known = declarations.get(key)
        if value.tag is not None:
            if value.tag.name == "delete" and known is not None:
                del declarations[key]
            elif value.tag.name == "delete":
                problems.add(value.place, f"!delete of the parameter {str(key)!r}, but nothing declares it")
            else:
                problems.add(value.place, f"{value.tag} in args: parameters are plain data", fix="make it a target")
        elif isinstance(value, MappingValue):
            declarations[key] = _declaration(known or Declaration(str(key), key.place), value, problems)
            if "default" in value:
                declarations[key] = declarations[key]._replace(bounded=None)
            elif known is not None and any(name in value for name in ("type", "choices", "min", "max", "pattern")):
                declarations[key] = declarations[key]._replace(bounded=key.place)
        elif known is not None:
            declarations[key] = known._replace(default=value, bounded=None)
        elif isinstance(value, Scalar) and value.content is None:
            fix = f"write {key}: {{type: int?, default: null}}, with the type it has when it is not null"
            problems.add(value.place, f"null does not tell the type of {str(key)!r}", fix=fix)
        else:
            declarations[key] = Declaration(str(key), key.place, type=_written_type(value), default=value)


def _declaration(known: Declaration, value: MappingValue, problems: Collector) -> Declaration:
    made = known
    for key, item in value.items.items():
        if key not in _KEYS:
            fix = did_you_mean(key, _KEYS, what="a declaration's keys")
            problems.add(key.place, f"unknown key {str(key)!r} in the declaration of {known.name!r}", fix=fix)
            continue
        if item.tag is not None:
            problems.add(item.place, f"{item.tag} in a declaration: it is plain data")
        elif key == "default":
            made = made._replace(default=item)
        elif key == "type":
            name = str(item.content) if isinstance(item, Scalar) else ""
            if name.removesuffix("?") not in TYPES:
                fix = did_you_mean(name.removesuffix("?"), TYPES, what="the types")
                problems.add(item.place, f"unknown type {name!r}", fix=fix + "; a ? after it allows null")
                continue
            made = made._replace(type=name.removesuffix("?"), is_nullable=name.endswith("?"))
        elif key == "choices":
            if not isinstance(item, ListValue) or not item.items:
                problems.add(item.place, "choices must be a list of values")
                continue
            with problems.collecting():
                made = made._replace(choices=tuple(plain_data(each) for each in item.items))
        elif key == "pattern":
            made = made._replace(pattern=_pattern(item, problems))
        elif key == "help":
            made = made._replace(help=str(item.content) if isinstance(item, Scalar) and item.content else "")
        else:
            bound = item.content if isinstance(item, Scalar) else None
            if isinstance(bound, bool) or not isinstance(bound, int | float | None):
                problems.add(item.place, f"{key} must be a number")
                continue
            made = made._replace(min=bound) if key == "min" else made._replace(max=bound)
    if made.type is None and (made.default is None or _is_null(made.default)):
        fix = f"write one of {', '.join(TYPES)}; a ? after it allows null"
        problems.add(known.place, f"the parameter {known.name!r} has no type", fix=fix)
        made = made._replace(type="yaml")
    if made.type not in (None, "int", "float") and (made.min is not None or made.max is not None):
        problems.add(known.place, f"min and max need a number, and {known.name!r} is a {made.type}")
    if made.type not in (None, "str", "path") and made.pattern is not None:
        problems.add(known.place, f"pattern needs text, and {known.name!r} is a {made.type}")
    if made.min is not None and made.max is not None and made.min > made.max:
        problems.add(known.place, f"no value of {known.name!r} is at least {made.min} and at most {made.max}")
    return made


def _pattern(item: Value, problems: Collector) -> str | None:
    text = item.content if isinstance(item, Scalar) else 0
    if text is None:
        return None
    try:
        re.compile(text if isinstance(text, str) else "(")
    except re.error as error:
        problems.add(item.place, f"pattern must be a regular expression, as text in quotes ({error})")
        return None
    return str(text)


def accept(declaration: Declaration, value: Plain, place: Place) -> Plain:
    """`value` as the parameter holds it. Raises Problems when it is of another type or out of bounds."""
    name = declaration.name
    kind = declaration.type or type_of(value)
    if value is None and (declaration.is_nullable or declaration.type is None):
        return None
    shown = kind + ("?" if declaration.is_nullable else "")
    if not _fits(value, kind):
        fix = f"write {name}'s value as {_EXAMPLES[kind]}" + (", or null" if declaration.is_nullable else "")
        if value is None:
            fix = f"give a value, or declare it as {kind}? ({declaration.place})"
        raise problem(place, f"{name!r} is of type {shown}, not {_shown(value)}", fix=fix)
    if kind == "float" and isinstance(value, int):
        value = float(value)
    if declaration.choices is not None and value not in declaration.choices:
        choices = ", ".join(_shown(each) for each in declaration.choices)
        known = [each for each in declaration.choices if isinstance(each, str)]
        near = did_you_mean(value, known) if isinstance(value, str) and known else ""
        fix = near if near.startswith("did") else f"choose one of: {choices}"
        raise problem(place, f"{name!r} cannot be {_shown(value)}; it is one of {choices}", fix=fix)
    if isinstance(value, str) and declaration.pattern is not None and not re.fullmatch(declaration.pattern, value):
        fix = "give text of that form" + (f": {declaration.help}" if declaration.help else "")
        raise problem(place, f"{name!r} cannot be {_shown(value)}; it does not match {declaration.pattern}", fix=fix)
    if isinstance(value, int | float):
        low, high = declaration.min, declaration.max
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
            raise problem(place, f"{name!r} is {value}, out of bounds: {bounds}", fix=f"give a value of {bounds}")
    return value


def type_of(value: Plain) -> str:
    """The parameter type of a plain value."""
    for kind, python in (("bool", bool), ("int", int), ("float", float), ("str", str)):
        if isinstance(value, python):
            return kind
    return "list" if isinstance(value, list | tuple) else "yaml"


def plain_data(value: Value) -> Plain:
    """Located data without tags as Python data. Raises Problems at a tag."""
    if value.tag is not None:
        raise problem(value.place, f"{value.tag} where plain data is asked for")
    if isinstance(value, Scalar):
        return value.content
    if isinstance(value, ListValue):
        return [plain_data(item) for item in value.items]
    assert isinstance(value, MappingValue), "the three kinds of value"
    return {str(key): plain_data(item) for key, item in value.items.items()}


def _written_type(value: Value) -> str | None:
    """The type of a short declaration's value; None for an expression, whose value tells it later."""
    if isinstance(value, Scalar):
        is_expression = isinstance(value.content, str) and "${" in value.content
        return None if is_expression else type_of(value.content)
    return "list"


def absolute(path: str, place: Place) -> str:
    """A path as text, relative to where it was written."""
    return os.path.normpath(place.folder / path)


_EXAMPLES = {
    "int": "a whole number, as 3",
    "float": "a number, as 3e-4",
    "str": "text",
    "bool": "true or false",
    "path": "a path, as text",
    "list": "a list, as [1, 2]",
    "yaml": "plain data",
}


def _fits(value: Plain, kind: str) -> bool:
    if kind == "yaml":
        return True
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if kind == "list":
        return isinstance(value, list | tuple)
    return isinstance(value, str)


def _shown(value: Plain) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str | Sequence | dict) else str(value)
    return text if len(text) < 60 else text[:57] + "..."


def _is_null(value: Value) -> bool:
    return isinstance(value, Scalar) and value.content is None
