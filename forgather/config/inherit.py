"""One config from the files it extends: each merged once, base first, in Python's order of inheritance (C3).

The root of a file is split here: `extends` and `description` belong to the file alone, `args` merge by the rule of
parameters, everything else is a target.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from forgather.config.files import find_reference
from forgather.config.merge import merge
from forgather.config.names import did_you_mean, is_near, why_no_name
from forgather.config.parameters import Declaration, declare
from forgather.config.problems import Collector, Problems, problem
from forgather.config.read import read_file
from forgather.config.tree import Key, ListValue, MappingValue, Place, Scalar, Value, shown_path

_ROOT_KEYS = ("extends", "description", "args")
_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


class Document(NamedTuple):
    """One file, split. `parents` in written order."""

    path: Path
    place: Place
    description: str
    parents: tuple[Path, ...]
    args: MappingValue | None
    targets: MappingValue


class Config(NamedTuple):
    """The merged files of one config, before parameters have values."""

    path: Path
    description: str
    declarations: dict[str, Declaration]
    targets: MappingValue
    order: tuple[Path, ...]


class Loader:
    """Reads files once each, however many configs share them."""

    def __init__(self) -> None:
        self._documents: dict[tuple[Path, tuple[Path, ...]], Document] = {}
        self._configs: dict[tuple[Path, tuple[Path, ...]], Config] = {}

    def load(self, path: Path, library: tuple[Path, ...]) -> Config:
        """The config in `path` with all it extends. Raises Problems, as many as can be told."""
        if (path, library) not in self._configs:
            self._configs[path, library] = self._load(path, library)
        return self._configs[path, library]

    def _load(self, path: Path, library: tuple[Path, ...]) -> Config:
        problems = Collector()
        order = self._linearize(path, library, (), {}, problems)
        problems.raise_any()
        documents = [self._documents[each, library] for each in reversed(order)]
        declarations: dict[str, Declaration] = {}
        targets = MappingValue({}, documents[-1].place)
        referred = _referred(documents)
        for document in documents:
            if document.parents:
                _refuse_unread_near_misses(declarations, document.args, referred, problems)
            declare(declarations, document.args, problems)
            if document.parents:
                _refuse_near_misses(targets, document.targets, referred, problems)
            merged = merge(targets, document.targets, (), problems)
            assert isinstance(merged, MappingValue), "a mapping into a mapping is one"
            targets = merged
        for name, declaration in declarations.items():
            if name in targets:
                key = targets.key(name)
                fix = "rename one of them: a reference could mean either"
                problems.add(key.place, f"{name!r} is a target, and a parameter at {declaration.place}", fix=fix)
        problems.raise_any()
        return Config(path, documents[-1].description, declarations, targets, tuple(reversed(order)))

    def _document(self, path: Path, library: tuple[Path, ...]) -> Document:
        if (path, library) not in self._documents:
            self._documents[path, library] = _split(path, library)
        return self._documents[path, library]

    def _linearize(
        self,
        path: Path,
        library: tuple[Path, ...],
        chain: tuple[Path, ...],
        done: dict[Path, list[Path]],
        problems: Collector,
    ) -> list[Path]:
        """The file and all it extends, the strongest first. Problems of the files are collected on the way."""
        if path in chain:
            cycle = " -> ".join(shown_path(each) for each in (*chain[chain.index(path) :], path))
            place = self._document(chain[-1], library).place
            raise problem(place, f"files extend one another in a circle: {cycle}", fix="break it at one of them")
        if path in done:
            return done[path]
        try:
            document = self._document(path, library)
        except type(problem(None, "")) as error:
            problems.found.extend(error.problems)
            return [path]
        demands: list[tuple[Path, list[Path]]] = []
        for parent in reversed(document.parents):  # the later parent wins
            demands.append((parent, self._linearize(parent, library, (*chain, path), done, problems)))
        demands.append((path, list(reversed(document.parents))))
        done[path] = [path, *_merge_orders(demands, document)]
        return done[path]


def _merge_orders(demands: list[tuple[Path, list[Path]]], document: Document) -> list[Path]:
    """C3: keeps every line's order; a file comes after all that override it. Raises Problems when two disagree.

    `demands` are lines of files, the strongest first, each with the file that asks for it.
    """
    lines = [line for _, line in demands if line]
    order: list[Path] = []
    while lines:
        head = next((line[0] for line in lines if not any(line[0] in other[1:] for other in lines)), None)
        if head is None:
            raise _inconsistent(demands, document)
        order.append(head)
        lines = [rest for line in lines if (rest := [each for each in line if each != head])]
    return order


def _inconsistent(demands: list[tuple[Path, list[Path]]], document: Document) -> Problems:
    for one, line in demands:
        for other, against in demands:
            pair = next(
                ((a, b) for a, b in combinations(line, 2) if b in against and a in against[against.index(b) :]), None
            )
            if pair is not None:
                a, b, one_, other_ = map(shown_path, (*pair, one, other))
                message = f"no order of the files is consistent: {one_} puts {a} over {b}, and {other_} {b} over {a}"
                fix = "write the parents in extends in the other order"
                if document.path not in (one, other):
                    fix = "let both extend them in one order: the later parent wins"
                return problem(document.place, message, fix=fix)
    return problem(document.place, "no order of the files is consistent with all that they extend")


def _split(path: Path, library: tuple[Path, ...]) -> Document:
    root = read_file(path)
    start = Place(str(path), 1, 1)
    if root is None:
        root = MappingValue({}, start)
    if not isinstance(root, MappingValue) or root.tag is not None:
        raise problem(root.place, "a config must be a mapping of targets", fix="write NAME: VALUE at its root")
    problems = Collector()
    parents = _parents(root.get("extends"), library, problems)
    description = root.get("description")
    if description is not None and not (isinstance(description, Scalar) and description.tag is None):
        problems.add(description.place, "description must be text")
    args = root.get("args")
    if isinstance(args, Scalar) and args.content is None and args.tag is None:
        args = None
    if args is not None and (not isinstance(args, MappingValue) or args.tag is not None):
        problems.add(args.place, "args must be a mapping of parameters", fix="write NAME: {type: ..., default: ...}")
        args = None
    targets: dict[Key, Value] = {}
    for key, value in root.items.items():
        if key in _ROOT_KEYS:
            continue
        reason = why_no_name(key)
        if reason is not None:
            near = did_you_mean(key, _ROOT_KEYS)
            fix = near if near.startswith("did") else "choose another name for the target"
            problems.add(key.place, f"the target {str(key)!r} {reason}", fix=fix)
        targets[key] = value
    problems.raise_any()
    text = "" if not isinstance(description, Scalar) or description.content is None else str(description.content)
    place = start if "extends" not in root else root.key("extends").place
    return Document(path, place, text, tuple(parents), args, MappingValue(targets, root.place))


def _parents(value: Value | None, library: tuple[Path, ...], problems: Collector) -> list[Path]:
    if value is None or (isinstance(value, Scalar) and value.content is None):
        return []
    items: Sequence[Value] = value.items if isinstance(value, ListValue) else [value]
    parents: list[Path] = []
    for item in items:
        if not isinstance(item, Scalar) or not isinstance(item.content, str) or item.tag is not None:
            problems.add(item.place, "extends names files, as text or a list of texts")
            continue
        with problems.collecting():
            parent = find_reference(item.content, item.place, library)
            if parent.is_dir():
                problems.add(item.place, f"{item.content!r} is a folder", fix="extends takes the path of a file")
            elif parent in parents:
                problems.add(item.place, f"{item.content!r} is extended twice", fix="remove one of them")
            else:
                parents.append(parent)
    return parents


def _refuse_near_misses(base: MappingValue, over: MappingValue, referred: set[str], problems: Collector) -> None:
    """A new value at the root beside one of nearly its name is a typo that would otherwise pass in silence.

    What is referred to is meant. Of values other than plain mappings, private ones are, and lists beside what is none.
    """
    for key, value in over.items.items():
        is_mapping = value.tag is None and isinstance(value, MappingValue)
        is_said_new = value.tag is not None and value.tag.name in ("replace", "delete", "patch")
        if key in base or key in referred or is_said_new or (key.startswith("_") and not is_mapping):
            continue
        for known, other in base.items.items():
            is_alike = is_mapping or _is_list(value) == _is_list(other)
            if known.startswith("_") == key.startswith("_") and known not in over and is_alike and is_near(key, known):
                new = f"write {key}: !replace {{...}}" if is_mapping else "give it another name"
                fix = f"did you mean {str(known)!r}? If it is new, {new}"
                problems.add(key.place, f"{str(key)!r} is new here, and nearly {str(known)!r} ({known.place})", fix=fix)
                break


def _refuse_unread_near_misses(
    known: Mapping[str, Declaration], args: MappingValue | None, referred: set[str], problems: Collector
) -> None:
    """A new parameter that nothing reads, beside one of nearly its name: the run would take the other's default."""
    if args is None:
        return
    for key, value in args.items.items():
        if key in known or key in referred or value.tag is not None:
            continue
        near = next((name for name in known if name not in args.items and is_near(key, name)), None)
        if near is not None:
            fix = f"did you mean {near!r}? If it is new, read it somewhere: ${{{key}}}"
            message = f"the parameter {str(key)!r} is new here, nothing reads it, and it is nearly {near!r}"
            problems.add(key.place, f"{message} ({known[near].place})", fix=fix)


def _is_list(value: Value) -> bool:
    return isinstance(value, ListValue) and not value.is_call


def _referred(documents: Sequence[Document]) -> set[str]:
    """Every name that a `!ref`, an expression or a `!code` of the files may mean."""
    names: set[str] = set()
    pending: list[tuple[Value, bool]] = [(document.targets, False) for document in documents]
    pending += [(document.args, False) for document in documents if document.args is not None]
    while pending:
        value, is_code = pending.pop()
        is_code = is_code or (value.tag is not None and value.tag.name == "code")
        if isinstance(value, Scalar):
            text = str(value.content)
            if is_code or "${" in text or (value.tag is not None and value.tag.name == "ref"):
                names.update(_NAME.findall(text))
        elif isinstance(value, MappingValue):
            pending += [(item, is_code) for item in value.items.values()]
        elif isinstance(value, ListValue):
            pending += [(item, is_code) for item in value.items]
    return names
