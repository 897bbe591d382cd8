"""What a config takes from whole configs: `!project`, another as a namespace; `!code`, one target as Python."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from forgather.config.context import Supplied
from forgather.config.emit import emit
from forgather.config.files import config_file, find_reference, read_project
from forgather.config.names import did_you_mean
from forgather.config.nodes import Constant, KeyPath, Node, NodeKey, Reference, Scope, Used, walk
from forgather.config.override import PROJECT_KEYS
from forgather.config.paths import format_path
from forgather.config.problems import Collector, problem
from forgather.config.tree import ListValue, MappingValue, Place, Plain, Scalar, Value, literal

if TYPE_CHECKING:
    from forgather.config.resolve import Namespace

_CODE_KEYS = ("target", "inputs", "freeze")


def open_project(outer: "Namespace", path: KeyPath, value: Value, scope: Scope | None) -> "Namespace":
    """The namespace of a `!project`. Equal ones of a graph are one instance. Raises Problems."""
    if scope is not None:
        fix = "make it a target of its own and refer to that"
        raise problem(value.place, "!project inside a !function", fix=fix)
    if not isinstance(value, MappingValue):
        raise problem(value.place, "!project takes a mapping", fix="write !project {dir: path/to/project}")
    problems = Collector()
    for written in value:
        if written not in PROJECT_KEYS:
            fix = did_you_mean(written, PROJECT_KEYS, what="its keys")
            problems.add(written.place, f"unknown key {str(written)!r} of !project", fix=fix)
    problems.raise_any()
    reader = _Arguments(outer, path, value)
    folder_name = reader.text("dir")
    if folder_name is None:
        raise problem(value.place, "!project without dir", fix="write dir: path/to/project, or dir: lib:NAME")
    folder_place = value.items[value.key("dir")].place
    folder = find_reference(folder_name, folder_place, outer.project.library, is_project=True)
    project = read_project(folder)
    config_name = reader.text("config")
    config_place = value.items[value.key("config")].place if "config" in value else value.place
    file = config_file(project, config_name, config_place)
    with problems.collecting():
        arguments = reader.arguments(problems)
        overrides = reader.overrides(problems)
        given = reader.given(problems)
    problems.raise_any()
    identity = "|".join(
        [
            str(file),
            *(f"{name}={supplied.value!r}" for name, supplied in sorted(arguments.items())),
            *(f"{name}:={_canonical(item)}" for name, item in overrides),
            *(f"{name}<-{_identity(node)}" for name, node in sorted(given.items())),
        ]
    )
    key = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    instances = outer.context.instances
    if key not in instances:
        config = outer.context.loader.load(file, project.library)
        instances[key] = type(outer)(
            outer.context,
            project,
            config,
            arguments,
            overrides,
            given,
            key=key,
            used=frozenset(reader.used | outer.used),
        )
    return instances[key]


class _Arguments:
    """Reads the keys of a `!project`, whose expressions are the outer config's."""

    def __init__(self, outer: "Namespace", path: KeyPath, value: MappingValue) -> None:
        self.outer = outer
        self.path = path
        self.value = value
        self.used: set[Used] = set()

    def text(self, key: str) -> str | None:
        item = self.value.get(key)
        if item is None:
            return None
        plain = self.plain((*self.path, key), item, f"{key} of a !project")
        if plain is not None and not isinstance(plain, str):
            raise problem(item.place, f"{key} of a !project must be text, not {plain!r}")
        return plain

    def plain(self, path: KeyPath, value: Value, what: str) -> Plain:
        made, used = self.outer.plain_at(path, value, what)
        self.used |= used
        return made

    def mapping(self, key: str) -> Mapping[str, Value]:
        item = self.value.get(key)
        if item is None or (isinstance(item, Scalar) and item.content is None and item.tag is None):
            return {}
        if not isinstance(item, MappingValue) or item.tag is not None:
            raise problem(item.place, f"{key} of a !project must be a mapping")
        return {str(name): each for name, each in item.items.items()}

    def arguments(self, problems: Collector) -> dict[str, Supplied]:
        made = {}
        for name, item in self.mapping("args").items():
            with problems.collecting():
                made[name] = Supplied(self.plain((*self.path, "args", name), item, "a project's argument"), item.place)
        return made

    def overrides(self, problems: Collector) -> list[tuple[str, Value]]:
        made = []
        for name, item in self.mapping("set").items():
            with problems.collecting():
                made.append((name, self.folded((*self.path, "set", name), item)))
        return made

    def given(self, problems: Collector) -> dict[str, Node]:
        made = {}
        for name, item in self.mapping("with").items():
            with problems.collecting():
                made[name] = self.outer.node((*self.path, "with", name), item, None)
        return made

    def folded(self, path: KeyPath, value: Value) -> Value:
        """The value with the outer config's expressions replaced by what they say; its tags are the inner config's."""
        if isinstance(value, MappingValue):
            items = {key: self.folded((*path, str(key)), item) for key, item in value.items.items()}
            return MappingValue(items, value.place, value.tag)
        if isinstance(value, ListValue):
            items_ = [self.folded((*path, index), item) for index, item in enumerate(value.items)]
            return ListValue(items_, value.place, value.tag)
        if isinstance(value, Scalar) and isinstance(value.content, str) and "${" in value.content:
            plain = self.plain(path, value.retagged(None), "an override of another project")
            return literal(plain, value.place).retagged(value.tag)
        return value


def projects(path: KeyPath, value: Value) -> Iterator[tuple[KeyPath, Value]]:
    """The `!project` nodes of a tree."""
    if value.tag is not None and value.tag.name == "project":
        yield path, value
    elif isinstance(value, MappingValue):
        for name, item in value.items.items():
            yield from projects((*path, str(name)), item)
    elif isinstance(value, ListValue):
        for index, item in enumerate(value.items):
            yield from projects((*path, index), item)


class Generated(NamedTuple):
    """Python, the parameters that are frozen in it, and the nodes that it builds."""

    text: str
    used: frozenset[Used]
    roots: tuple[Node, ...]


def code_of(outer: "Namespace", key: NodeKey, value: Value) -> Generated:
    """The Python that a `!code` stands for. Raises Problems."""
    if not isinstance(value, MappingValue):
        raise problem(value.place, "!code takes a mapping", fix="write !code {target: NAME, inputs: [...]}")
    problems = Collector()
    for written in value:
        if written not in _CODE_KEYS:
            fix = did_you_mean(written, _CODE_KEYS, what="its keys")
            problems.add(written.place, f"unknown key {str(written)!r} of !code", fix=fix)
    problems.raise_any()
    read: dict[str, list[str]] = {}
    for name in _CODE_KEYS:
        item = value.get(name)
        plain = None if item is None else outer.plain_at((*key.path, name), item, f"{name} of !code")[0]
        names = [] if plain is None else plain if isinstance(plain, list) else [plain]
        if not all(isinstance(each, str) for each in names):
            raise problem(value.place if item is None else item.place, f"{name} of !code must be names")
        read[name] = [str(each) for each in names]
    if len(read["target"]) != 1:
        raise problem(value.place, "!code needs one target", fix="write target: NAME")
    return generate(outer, read["target"], read["inputs"], read["freeze"], value.place)


def generate(
    namespace: "Namespace", targets: list[str], inputs: list[str], freeze: list[str] | None, place: Place
) -> Generated:
    """Python that builds targets from inputs; `freeze` None freezes every parameter. Raises Problems."""
    inputs = list(dict.fromkeys(inputs))  # each is a parameter of the code, which takes none twice
    other = namespace.giving(inputs, place)
    problems = Collector()
    roots: list[Node] = []
    for name in targets:
        with problems.collecting():
            roots.append(other.target(name, place))
    for name in freeze or ():
        if name not in namespace.config.declarations:
            fix = did_you_mean(name, namespace.config.declarations, what="its parameters")
            problems.add(place, f"freeze: no parameter {name!r}", fix=fix)
    problems.raise_any()
    used = frozenset(each for node in walk(roots) for each in node.used)
    for each in sorted(used, key=lambda used_: (used_.place, used_.name)):
        if freeze is not None and each.namespace == namespace.key and each.name not in freeze:
            fix = (
                f"read it through an input, as ${{{inputs[0] if inputs else 'INPUT'}.{each.name}}}, or add it to freeze"
            )
            message = f"the code of {', '.join(targets)} ({place}) would hold the value of the parameter {each.name!r}"
            problems.add(each.place, message, fix=fix)
    problems.raise_any()
    namespace.read_parameters |= other.read_parameters
    return Generated(emit(roots, inputs), used, tuple(roots))


def _identity(node: Node) -> str:
    """Equal for nodes that are the same in every build."""
    while isinstance(node, Reference):
        node = node.target
    return repr(node.value) if isinstance(node, Constant) else f"{node.key.namespace}:{format_path(node.key.path)}"


def _canonical(value: Value) -> str:
    inside: str
    if isinstance(value, MappingValue):
        inside = "{" + ",".join(f"{str(key)!r}:{_canonical(item)}" for key, item in value.items.items()) + "}"
    elif isinstance(value, ListValue):
        inside = "[" + ",".join(_canonical(item) for item in value.items) + "]"
    else:
        assert isinstance(value, Scalar), "the three kinds of value"
        inside = repr(value.content)
    return f"{value.tag or ''}{inside}"
