"""Reads one YAML file strictly, into located data.

Events come from libyaml through PyYAML; its pure-Python parser differs in what it accepts and is eight times slower,
so there is no falling back to it. All problems of a file that do not stop the parser are told together.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from forgather.config.names import did_you_mean
from forgather.config.problems import Collector, problem
from forgather.config.scalars import AmbiguousScalarError, read_plain
from forgather.config.tree import (
    BARE_TAGS,
    SPEC_TAGS,
    Key,
    ListValue,
    MappingValue,
    Place,
    Scalar,
    Tag,
    Value,
    shown_path,
)
from forgather.errors import ConfigError

_MAX_DEPTH = 100
_PADDED_TAG = re.compile(r"![^\s,\[\]{}]*[\]},]")


def read_file(path: Path) -> Value | None:
    """The one document of a file; None when it holds nothing. Raises Problems."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        place = Place(str(path), line, error.start - error.object.rfind(b"\n", 0, error.start))
        raise problem(place, "this byte is not UTF-8", fix="save the file as UTF-8") from None
    except OSError as error:
        raise problem(None, f"cannot read {shown_path(path)}: {error.strerror}") from None
    return read(text, str(path))


def read(text: str, file: str) -> Value | None:
    """The one document of `text`; None when it holds nothing. `file` is what its places name. Raises Problems."""
    return _Reader(text, file, first_line=1).document()


def read_word(text: str, word: str) -> Value:
    """A value written on the command line, inside the word `word`."""
    value = _Reader(text, word, first_line=None).document()
    return Scalar(None, Place(word)) if value is None else value


class _Reader:
    def __init__(self, text: str, file: str, first_line: int | None) -> None:
        if not yaml.__with_libyaml__:
            raise ConfigError(
                "this PyYAML was built without libyaml", fix="pip install --force-reinstall --only-binary :all: pyyaml"
            )
        self.text = text
        self.file = file
        self.first_line = first_line
        self.problems = Collector()
        self.depth = 0
        try:
            self.parser = yaml.CLoader(text)
        except UnicodeEncodeError:  # bytes of a command line that are no text
            raise problem(self._at(0, 0), "this is not UTF-8", fix="write it as UTF-8") from None
        except yaml.YAMLError as error:
            raise self._syntax(error) from None

    def document(self) -> Value | None:
        self._next()  # start of the stream
        value = None
        event = self._next()
        if not isinstance(event, yaml.StreamEndEvent):
            value = self._value(self._next())
            self._next()  # end of the document
            event = self._next()
            if not isinstance(event, yaml.StreamEndEvent):
                self.problems.add(self._place(event), "a second document", fix="one file holds one document")
        self.problems.raise_any()
        return value

    def _next(self) -> Any:
        try:
            return self.parser.get_event()
        except yaml.YAMLError as error:
            self.problems.found.extend(self._syntax(error).problems)
            self.problems.raise_any()
            raise AssertionError("a syntax error was collected just now") from error

    def _place(self, event: Any) -> Place:
        return self._at(event.start_mark.line, event.start_mark.column)

    def _at(self, line: int, column: int) -> Place:
        return Place(self.file) if self.first_line is None else Place(self.file, line + self.first_line, column + 1)

    def _value(self, event: Any) -> Value:
        place = self._place(event)
        if isinstance(event, yaml.AliasEvent):
            self.problems.add(place, f"alias *{event.anchor}", fix="refer to a value by its path: !ref path.to.it")
            return Scalar(None, place)
        if event.anchor is not None:
            fix = "remove it: every value can be referred to by its path, as in !ref path.to.it"
            self.problems.add(place, f"anchor &{event.anchor}", fix=fix)
        tag = self._tag(event.tag, place)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, tag, place)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise problem(place, f"more than {_MAX_DEPTH} levels of nesting")
        made = self._list(tag, place) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(tag, place)
        self.depth -= 1
        return made

    def _list(self, tag: Tag | None, place: Place) -> ListValue:
        items = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._value(event))
        return ListValue(items, place, tag)

    def _mapping(self, tag: Tag | None, place: Place) -> MappingValue:
        items: dict[Key, Value] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._key(event)
            value = self._value(self._next())
            if key in items:
                first = next(other for other in items if other == key)
                self.problems.add(
                    key.place, f"duplicate key {str(key)!r}, first at {first.place}", fix="keep one of them"
                )
            else:
                items[key] = value
        return MappingValue(items, place, tag)

    def _key(self, event: Any) -> Key:
        place = self._place(event)
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            value = self._value(event)  # read on past it, so that what follows is told too
            self.problems.add(place, "a key must be text", fix="write the key as a word or a quoted text")
            return Key(f"<{value.place}>", place)
        if event.anchor is not None:
            self.problems.add(place, f"anchor &{event.anchor}", fix="remove it; refer to values by !ref path.to.it")
        if event.value == "<<" and event.implicit[0]:
            fix = "inherit with extends, or name a target and refer to it by !ref"
            self.problems.add(place, "the merge key << is not part of this language", fix=fix)
        return Key(event.value, place)

    def _scalar(self, event: Any, tag: Tag | None, place: Place) -> Scalar:
        is_unquoted = event.style in ("", None)
        if tag is not None:
            return Scalar(event.value or None, place, tag)
        if not is_unquoted:
            return Scalar(event.value, place)
        try:
            return Scalar(read_plain(event.value), place)
        except AmbiguousScalarError as error:
            self.problems.add(place, str(error), fix=error.fix)
            return Scalar(event.value, place)

    def _tag(self, written: str | None, place: Place) -> Tag | None:
        if written is None:
            return None
        name, colon, spec = written.removeprefix("!").partition(":")
        tag = Tag(name, spec)
        if not written.startswith("!") or written == "!":
            shown = written.replace("tag:yaml.org,2002:", "!!")
            self.problems.add(
                place, f"unknown tag {shown}", fix="quote a scalar to make it text; other types need none"
            )
        elif name in SPEC_TAGS:
            if not spec:
                self.problems.add(place, f"!{name} needs a SPEC", fix=f"write !{name}:package.module:Symbol")
        elif name not in BARE_TAGS:
            fix = did_you_mean(name, [*SPEC_TAGS, *BARE_TAGS], what="known tags")
            self.problems.add(place, f"unknown tag !{name}", fix=fix)
            return None
        elif colon:
            self.problems.add(place, f"!{name} takes nothing after a colon", fix=f"write !{name} VALUE")
        return tag if written.startswith("!") and written != "!" else None

    def _syntax(self, error: yaml.YAMLError) -> Any:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        start = getattr(error, "context_mark", None)
        if start is not None and getattr(error, "context", None) == "while scanning a quoted scalar":
            return problem(
                self._at(start.line, start.column),
                "YAML: a quoted text that does not end",
                fix="close the quote; a quote inside of '...' is written twice",
            )
        if mark is None:  # a character that YAML does not allow, met before parsing
            position = getattr(error, "position", 0)
            before = self.text[:position]
            place = self._at(before.count("\n"), position - (before.rfind("\n") + 1))
            return problem(place, f"YAML: {getattr(error, 'reason', error)}", fix="remove the character")
        line = self.text.split("\n")[mark.line] if mark.line < self.text.count("\n") + 1 else ""
        place = self._at(mark.line, mark.column)
        before, after = line[: mark.column], line[mark.column :]
        if before.endswith("$") and after.startswith("{"):
            column = max(before.rfind(mark_) for mark_ in " [{,") + 1
            return problem(
                self._at(mark.line, column),
                "an unquoted ${...} inside {...} or [...]: YAML takes its brace for its own",
                fix='quote it: "${...}", or write the mapping or list in block style, one item a line',
            )
        padded = _PADDED_TAG.search(line, max(before.rfind("!"), 0))
        if getattr(error, "context", None) == "while scanning a tag" and padded:
            tag = padded[0][:-1]
            return problem(
                self._at(mark.line, padded.start()),
                f"the tag {tag} stands right before {padded[0][-1]!r}, which YAML reads as part of it",
                fix=f"put a blank after it: {tag} {padded[0][-1]}",
            )
        said = " ".join(part for part in (getattr(error, "problem", None), getattr(error, "context", None)) if part)
        fix = None
        if "${" in line:
            fix = "quote a value that holds ${...} with ': ' or ' #' inside"
        elif "mapping values are not allowed" in said:
            fix = "check the indentation, and quote text that holds ': '"
        elif "tab character" in said or "\t" in line:
            fix = "indent with blanks, not tabs"
        elif line.lstrip().startswith(("@", "`", "%")) or after.startswith(("@", "`", "%")):
            fix = "quote text that begins with one of @ ` %"
        return problem(place, f"YAML: {said}", fix=fix)
