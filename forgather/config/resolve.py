"""From a merged tree and the values of its parameters to the node graph.

A `Namespace` is one config with its arguments: the selected one, or one that a `!project` names. Nodes are made when
they are first asked for, each place once; what cannot be resolved is told with its place, as many places as were asked
for. Resolving imports nothing and builds nothing.
"""

from collections.abc import Iterable, Mapping

from forgather.config.context import Context, Reached, Supplied
from forgather.config.files import ProjectFolder, find_reference
from forgather.config.fold import fold
from forgather.config.inherit import Config
from forgather.config.names import did_you_mean, why_no_name
from forgather.config.nested import code_of, open_project
from forgather.config.nodes import (
    Call,
    Constant,
    Container,
    Entries,
    Function,
    Given,
    KeyPath,
    Node,
    NodeKey,
    Part,
    Reference,
    Scope,
    Source,
    Symbol,
    Used,
)
from forgather.config.override import apply_override
from forgather.config.parameters import absolute, accept
from forgather.config.paths import Step, format_path
from forgather.config.plain import NotPlainError, plain_value
from forgather.config.problems import Collector, Problem, Problems, problem
from forgather.config.reach import reach, reference_steps
from forgather.config.specs import parse_spec
from forgather.config.tree import Key, ListValue, MappingValue, Place, Plain, Scalar, Value


class Namespace:
    """One config with its arguments, overrides and given targets. Raises Problems when these do not fit it."""

    def __init__(
        self,
        context: Context,
        project: ProjectFolder,
        config: Config,
        arguments: Mapping[str, Supplied],
        overrides: Iterable[tuple[str, Value]] = (),
        given: Mapping[str, Node] | None = None,
        *,
        key: str = "",
        used: frozenset[Used] = frozenset(),
    ) -> None:
        self.context = context
        self.project = project
        self.config = config
        self.arguments = arguments
        self.overrides = tuple(overrides)
        self.given = dict(given or {})
        self.key = key
        self.used = used
        self._nodes: dict[KeyPath, Node | Problems] = {}
        self._values: dict[str, Plain | Problems] = {}
        self._scopes: dict[KeyPath, Scope] = {}
        self._instances: dict[KeyPath, Namespace] = {}
        self.read_parameters: set[str] = set()
        problems = Collector()
        self.tree = config.targets
        for name, argument in arguments.items():
            if name not in config.declarations:
                fix = did_you_mean(name, config.declarations, what="its parameters")
                problems.add(argument.place, f"{config.path.name} has no parameter {name!r}", fix=fix)
        for path, value in self.overrides:
            self.tree = apply_override(self.tree, path, value, problems, config.declarations)
        for name, node in self.given.items():
            if name not in self.tree:
                fix = did_you_mean(name, self.tree, what="its targets")
                problems.add(node.place, f"{config.path.name} has no target {name!r} that could be given", fix=fix)
        problems.raise_any()

    # Parameters

    def value(self, name: str) -> Plain:
        """The value of a parameter. Raises Problems."""
        known = self._values.get(name)
        if isinstance(known, Problems):
            raise known
        if name not in self._values:
            try:
                self._values[name] = self._parameter(name)
            except Problems as error:
                self._values[name] = error
                raise
        return self._values[name]  # type: ignore[return-value]

    def _parameter(self, name: str) -> Plain:
        declaration = self.config.declarations[name]
        if name in self.arguments:
            value, place = self.arguments[name]
        elif declaration.default is None:
            fix = f"give it by --{name.replace('_', '-')} VALUE, or in a config by args: {{{name}: VALUE}}"
            raise Problems([Problem(declaration.place, f"the parameter {name!r} has no value", fix, True)])
        else:
            place = declaration.default.place
            with self.context.entered(NodeKey(self.key, ("args", name)), place):
                value = self.plain_at(("args", name, "default"), declaration.default, "a parameter's default")[0]
        is_default = name not in self.arguments
        value = accept(declaration, value, declaration.bounded if is_default and declaration.bounded else place)
        return self.resolve_path(place, value) if declaration.type == "path" and isinstance(value, str) else value

    def parameter_place(self, name: str) -> Place | None:
        """Where the value of a parameter was written: a flag, a `!project`, or the last file that says it."""
        if name in self.arguments:
            return self.arguments[name].place
        default = self.config.declarations[name].default
        return None if default is None else default.place

    def resolve_path(self, place: Place, text: str) -> str:
        """A path as text: relative to where it was written; `lib:` looks in the library."""
        if text.startswith("lib:"):
            return str(find_reference(text, place, self.project.library))
        return absolute(text, place)

    # References

    def target(self, name: str, place: Place | None = None) -> Node:
        """The node of a target. Raises Problems with the nearest name."""
        if name in self.given:
            return self.given[name]
        value = self.tree.get(name)
        if value is None:
            public = [each for each in self.tree if not each.startswith("_")]
            fix = did_you_mean(name, self.tree if name.startswith("_") else public, what="its targets")
            raise problem(place, f"{self.config.path.name} has no target {name!r}", fix=fix)
        return self.node((name,), value, None)

    def reach(
        self, steps: tuple[Step, ...], place: Place, scope: Scope | None, *, in_expression: bool = False
    ) -> Reached:
        """What a path leads to from where it is written. Raises Problems with the nearest name."""
        return reach(self, steps, place, scope, in_expression=in_expression)

    # Nodes

    def node(self, path: KeyPath, value: Value, scope: Scope | None) -> Node:
        """The node of the value at `path`, made once. Raises Problems, the same again when it failed before."""
        known = self._nodes.get(path)
        if known is None:
            try:
                with self.context.entered(NodeKey(self.key, path), value.place):
                    known = self._make(NodeKey(self.key, path), value, scope)
            except Problems as error:
                known = error
            except RecursionError:
                fix = "refer to what is meant directly"
                known = problem(value.place, "the chain of references through this place is too long", fix=fix)
            self._nodes[path] = known
        if isinstance(known, Problems):
            raise known
        return known

    def _make(self, key: NodeKey, value: Value, scope: Scope | None) -> Node:
        name = value.tag.name if value.tag else None
        spec_text = value.tag.spec if value.tag else ""
        match name:
            case None:
                return self._untagged(key, value, scope)
            case "singleton" | "factory" | "partial":
                return self._call(key, name, spec_text, value, scope)
            case "symbol":
                if not isinstance(value, Scalar) or not value.is_empty:
                    fix = "a symbol has no arguments: write !singleton:, !factory: or !partial:"
                    raise problem(value.place, f"{value.tag} takes nothing", fix=fix)
                return Symbol(key, value.place, scope, parse_spec(spec_text, value.place, self.project.library))
            case "ref":
                return self._reference(key, value, scope)
            case "function":
                return self._function(key, value, scope)
            case "values":
                if not isinstance(value, MappingValue):
                    raise problem(value.place, "!values takes a mapping", fix="a plain list needs no tag")
                children = self._children(key, value.items.items(), scope)
                return Container(key, value.place, scope, "values", tuple(child for _, child in children))
            case "tuple":
                if not isinstance(value, ListValue):
                    raise problem(value.place, "!tuple takes a list", fix="write !tuple [a, b]")
                children = self._children(key, enumerate(value.items), scope)
                return Container(key, value.place, scope, "tuple", tuple(child for _, child in children))
            case "code":
                return self._code(key, value, scope)
            case "project":
                self.instance(key.path, value, scope)
                fix = f"name one of its targets, as in !ref {format_path(key.path)}.main"
                raise problem(
                    value.place, f"{format_path(key.path)!r} is a project, and a project is no object", fix=fix
                )
        raise problem(value.place, f"{value.tag} cannot stand here", fix="it belongs to a key that overrides another")

    def _untagged(self, key: NodeKey, value: Value, scope: Scope | None) -> Node:
        if isinstance(value, Scalar):
            return fold(self, key, value, scope)
        if isinstance(value, ListValue):
            children = self._children(key, enumerate(value.items), scope)
            return Container(key, value.place, scope, "list", tuple(child for _, child in children))
        assert isinstance(value, MappingValue), "the three kinds of value"
        entries = self._children(key, value.items.items(), scope)
        return Entries(key, value.place, scope, tuple((str(name), child) for name, child in entries))

    def _children(
        self, key: NodeKey, items: Iterable[tuple[str | int, Value]], scope: Scope | None
    ) -> list[tuple[str | int, Node]]:
        """The nodes inside of one. Problems of all of them are told together."""
        problems = Collector()
        made: list[tuple[str | int, Node]] = []
        for name, item in items:
            with problems.collecting():
                made.append((name, self.node((*key.path, str(name) if isinstance(name, str) else name), item, scope)))
        problems.raise_any()
        return made

    def _call(self, key: NodeKey, kind: str, text: str, value: Value, scope: Scope | None) -> Call:
        problems = Collector()
        arguments: list[tuple[str | None, Node]] = []
        spec = None
        with problems.collecting():
            spec = parse_spec(text, value.place, self.project.library)
        with problems.collecting():
            if isinstance(value, ListValue):
                arguments = [(None, child) for _, child in self._children(key, enumerate(value.items), scope)]
            elif isinstance(value, MappingValue):
                arguments = self._keywords(key, value, scope)
            elif isinstance(value, Scalar) and not value.is_empty:
                fix = f"write {value.tag} [{value.content}], or name it: {value.tag} {{name: {value.content}}}"
                raise problem(value.place, f"the arguments of {value.tag} must be a mapping or a list", fix=fix)
        problems.raise_any()
        assert spec is not None, "a missing SPEC is a problem"
        if kind == "partial":
            for _, argument in arguments:
                _refuse_factory(argument)
        return Call(key, value.place, scope, kind, spec, tuple(arguments))

    def _keywords(self, key: NodeKey, value: MappingValue, scope: Scope | None) -> list[tuple[str | None, Node]]:
        arguments: list[tuple[str | None, Node]] = []
        for name, child in self._children(key, value.items.items(), scope):
            if name == "*" and isinstance(child, Container) and child.kind == "list":
                arguments += [(None, item) for item in child.items]
            else:
                if name == "*" and isinstance(child, Constant | Entries | Call):
                    plain = child.value if isinstance(child, Constant) else None
                    if not isinstance(plain, list | tuple):
                        raise problem(child.place, '"*" gives the positional arguments: it takes a list')
                arguments.append((name if isinstance(name, Key) else str(name), child))
        return arguments

    def _reference(self, key: NodeKey, value: Value, scope: Scope | None) -> Node:
        steps, used = reference_steps(self, key.path, value, scope)
        reached = self.reach(steps, value.place, scope)
        used |= reached.used
        reference = Reference(key, value.place, scope, reached.node, used)
        if not reached.remaining:
            return reference
        base = Reference(NodeKey(key.namespace, (*key.path, "(base)")), value.place, scope, reached.node, used)
        return Part(key, value.place, scope, base, steps[-reached.remaining :])

    def _function(self, key: NodeKey, value: Value, scope: Scope | None) -> Function:
        body = self.body(key.path, value, scope)
        assert isinstance(value, MappingValue), "the body was read from it"
        result = self.node((*key.path, "result"), value.items[value.key("result")], body)
        return Function(key, value.place, scope, body, result)

    def body(self, path: KeyPath, value: Value, scope: Scope | None) -> Scope:
        if path not in self._scopes:
            params = _function_params(value)
            self._scopes[path] = Scope(NodeKey(self.key, path), params, scope)
        return self._scopes[path]

    def plain_at(self, path: KeyPath, value: Value, what: str) -> tuple[Plain, frozenset[Used]]:
        """The plain data of a value that may hold expressions. Raises Problems when it holds more."""
        node = self.node(path, value, None)
        used: set[Used] = set()
        try:
            return plain_value(node, used), frozenset(used)
        except NotPlainError as error:
            raise problem(error.place, f"{what} must be plain data, known before building") from None

    # Other projects, and code of other targets: see `nested`

    def instance(self, path: KeyPath, value: Value, scope: Scope | None) -> "Namespace":
        """The namespace of the `!project` at `path`. Raises Problems."""
        if path not in self._instances:
            self._instances[path] = open_project(self, path, value, scope)
        return self._instances[path]

    def _code(self, key: NodeKey, value: Value, scope: Scope | None) -> Source:
        return Source(key, value.place, scope, *code_of(self, key, value))

    def giving(self, names: Iterable[str], place: Place) -> "Namespace":
        """The same config with other targets given."""
        given = {name: Given(NodeKey(self.key, (name,)), place, name) for name in names}
        context = Context(self.context.loader, self.context.output, self.context.stack)
        return Namespace(
            context,
            self.project,
            self.config,
            self.arguments,
            self.overrides,
            {**self.given, **given},
            key=self.key,
            used=self.used,
        )


def _function_params(value: Value) -> tuple[str, ...]:
    """The parameters of a `!function`. Raises Problems when its mapping is not as it must be."""
    example = "write !function {params: [name], result: NODE}"
    if not isinstance(value, MappingValue):
        raise problem(value.place, "!function takes a mapping", fix=example)
    problems = Collector()
    for key in value:
        if key not in ("params", "result"):
            fix = did_you_mean(key, ("params", "result"), what="its keys")
            problems.add(key.place, f"unknown key {str(key)!r} of !function", fix=fix)
    if "result" not in value:
        problems.add(value.place, "!function without result", fix=example)
    params = value.get("params")
    names: list[str] = []
    if params is not None and not (isinstance(params, Scalar) and params.content is None):
        if not isinstance(params, ListValue):
            problems.add(params.place, "params must be a list of names", fix=example)
        for item in params.items if isinstance(params, ListValue) else ():
            name = item.content if isinstance(item, Scalar) and item.tag is None else None
            reason = why_no_name(name) if isinstance(name, str) else "is no name"
            if reason or name in names:
                problems.add(item.place, f"the parameter {name!r} {reason or 'is there twice'}")
            names.append(str(name))
    problems.raise_any()
    return tuple(names)


def _refuse_factory(node: Node) -> None:
    """A `!partial` builds its arguments once, which is not what `!factory` promises."""
    if isinstance(node, Reference):
        _refuse_factory(node.target)
    elif isinstance(node, Container | Entries):
        for child in node.children():
            _refuse_factory(child)
    elif isinstance(node, Call) and node.kind == "factory":
        fix = "use !function, which builds what is inside at each call, or !singleton here"
        raise problem(node.place, f"!factory:{node.spec} below a !partial would be built once", fix=fix)
