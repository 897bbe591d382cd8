"""Located data: what a YAML file says, and where it says it.

Every value and every key remembers the file, line and column where it was written, through inheritance, overrides and
resolution, so that an error can always point at text that somebody can edit. Trees are never changed in place: a merge
makes new ones.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"] | tuple["Plain", ...]

# The tags that take a SPEC after a colon, and those that stand alone.
SPEC_TAGS = ("singleton", "factory", "partial", "symbol", "patch")
BARE_TAGS = ("ref", "function", "project", "code", "values", "tuple", "delete", "replace", "append", "prepend")
CALL_TAGS = ("singleton", "factory", "partial")


class Place(NamedTuple):
    """Where something was written. Line 0 stands for a command line or a Python call: `file` then names the word."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{shown_path(self.file)}:{self.line}:{self.column}" if self.line else self.file

    @property
    def folder(self) -> Path:
        """The folder that relative paths written here start from."""
        return Path(self.file).parent if self.line else Path.cwd()


def shown_path(file: str | Path) -> str:
    """The path as a reader would type it: relative to the working directory when it lies below."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return str(file)


class Key(str):
    """A mapping's key: a string that knows its place."""

    __slots__ = ("place",)
    place: Place

    def __new__(cls, text: str, place: Place) -> "Key":
        key = super().__new__(cls, text)
        key.place = place
        return key


class Tag(NamedTuple):
    """`!name` or `!name:spec`."""

    name: str
    spec: str = ""

    def __str__(self) -> str:
        return f"!{self.name}:{self.spec}" if self.spec else f"!{self.name}"


class Value:
    """One value of a tree, with its tag if it has one."""

    __slots__ = ("place", "tag")

    def __init__(self, place: Place, tag: Tag | None = None) -> None:
        self.place = place
        self.tag = tag

    def retagged(self, tag: Tag | None, place: Place | None = None) -> "Value":
        raise NotImplementedError

    @property
    def is_template(self) -> bool:
        """True for text with expressions in it."""
        return False

    @property
    def is_call(self) -> bool:
        return self.tag is not None and self.tag.name in CALL_TAGS


class Scalar(Value):
    """None, a bool, a number or text. `is_literal` text holds no expressions, whatever it looks like."""

    __slots__ = ("content", "is_literal")

    def __init__(self, content: Plain, place: Place, tag: Tag | None = None, *, is_literal: bool = False) -> None:
        super().__init__(place, tag)
        self.content = content
        self.is_literal = is_literal

    def retagged(self, tag: Tag | None, place: Place | None = None) -> "Scalar":
        return Scalar(self.content, place or self.place, tag, is_literal=self.is_literal)

    @property
    def is_template(self) -> bool:
        text = self.content
        return self.tag is None and not self.is_literal and isinstance(text, str) and "${" in text

    @property
    def is_empty(self) -> bool:
        """Nothing stands here but perhaps a tag."""
        return self.content is None or self.content == ""


class ListValue(Value):
    """A YAML sequence."""

    __slots__ = ("items",)

    def __init__(self, items: list[Value], place: Place, tag: Tag | None = None) -> None:
        super().__init__(place, tag)
        self.items = items

    def retagged(self, tag: Tag | None, place: Place | None = None) -> "ListValue":
        return ListValue(self.items, place or self.place, tag)


class MappingValue(Value):
    """A YAML mapping, in written order."""

    __slots__ = ("items",)

    def __init__(self, items: dict[Key, Value], place: Place, tag: Tag | None = None) -> None:
        super().__init__(place, tag)
        self.items = items

    def retagged(self, tag: Tag | None, place: Place | None = None) -> "MappingValue":
        return MappingValue(self.items, place or self.place, tag)

    def get(self, key: str) -> Value | None:
        # A Key hashes and compares as the text it is.
        return self.items.get(key)  # type: ignore[call-overload, no-any-return]

    def key(self, text: str) -> Key:
        """The key as it was written, with its place."""
        return next(key for key in self.items if key == text)

    def __contains__(self, key: str) -> bool:
        return key in self.items

    def __iter__(self) -> Iterator[Key]:
        return iter(self.items)


def located(value: object, place: Place) -> Value:
    """A Python value as located data. Raises TypeError for what YAML could not say."""
    if value is None or isinstance(value, bool | int | float | str):
        return Scalar(value, place)
    if isinstance(value, Path):
        return Scalar(str(value), place, is_literal=True)
    if isinstance(value, Mapping):
        return MappingValue({Key(str(key), place): located(item, place) for key, item in value.items()}, place)
    if isinstance(value, tuple):
        return ListValue([located(item, place) for item in value], place, Tag("tuple"))
    if isinstance(value, list):
        return ListValue([located(item, place) for item in value], place)
    raise TypeError(f"{type(value).__name__} is not plain data")


def literal(value: Plain, place: Place) -> Value:
    """A computed value as located data: its text is taken as it stands."""
    if isinstance(value, dict):
        return MappingValue({Key(key, place): literal(item, place) for key, item in value.items()}, place)
    if isinstance(value, list | tuple):
        tag = Tag("tuple") if isinstance(value, tuple) else None
        return ListValue([literal(item, place) for item in value], place, tag)
    return Scalar(value, place, is_literal=True)
