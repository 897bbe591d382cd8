"""`Project`: one config of one project, with its arguments; what the commands and Python users work with."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from forgather.config.check import check_config
from forgather.config.context import Context, Supplied
from forgather.config.files import config_file, find_project, output_folder, read_project
from forgather.config.graph import draw
from forgather.config.inherit import Loader
from forgather.config.nested import generate
from forgather.config.nodes import Call, Node, Reference
from forgather.config.override import parse_word, python_overrides
from forgather.config.parameters import Parameter, type_of
from forgather.config.plain import NotPlainError, is_plain, plain_value
from forgather.config.problems import Collector, Problems, problem
from forgather.config.resolve import Namespace
from forgather.config.session import Session
from forgather.config.show import digest, show
from forgather.config.tree import Place, Value


class Project:
    """A config of the project at or above `path`, selected by name, or the default one.

    `args` gives parameters by name, as Python values; `set` overrides places, `{"main.steps": 50}`; `words` are
    overrides as the command line writes them, `["main.steps=50"]`. Raises ConfigError with every problem found.
    """

    def __init__(
        self,
        path: str | Path = ".",
        config: str | None = None,
        args: Mapping[str, Any] | None = None,
        set: Mapping[str, Any] | None = None,
        words: Sequence[str] = (),
    ) -> None:
        folder = read_project(find_project(path))
        self._loader = Loader()
        file = config_file(folder, config, None if config is None else Place(f"config {config!r}"))
        merged = self._loader.load(file, folder.library)
        problems = Collector()
        overrides: list[tuple[str, Value]] = []
        with problems.collecting():
            overrides += python_overrides(set or {})
        for word in words:
            with problems.collecting():
                overrides.append(parse_word(word))
        for name, value in (args or {}).items():
            if not is_plain(value) and not isinstance(value, Path):
                problems.add(_flag(name), f"a parameter is plain data, not a {type(value).__name__}")
        problems.raise_any()
        supplied = {
            name: Supplied(str(value) if isinstance(value, Path) else value, _flag(name))
            for name, value in (args or {}).items()
        }
        self._output = output_folder(folder.dir)
        self._namespace = Namespace(Context(self._loader, self._output), folder, merged, supplied, overrides)
        self._path, self._args, self._set, self._words = path, dict(args or {}), dict(set or {}), tuple(words)

    def replaced(
        self, args: Mapping[str, Any] | None = None, set: Mapping[str, Any] | None = None, words: Sequence[str] = ()
    ) -> "Project":
        """The same config with more arguments and overrides, which win over those it has."""
        return Project(
            self.dir,
            self.config_name,
            {**self._args, **(args or {})},
            {**self._set, **(set or {})},
            (*self._words, *words),
        )

    def __reduce__(self) -> tuple[object, ...]:
        # To another process a config travels as what it was read from, and is read there.
        return Project, (self.dir, self.config_name, self._args, self._set, self._words)

    @property
    def name(self) -> str:
        return self._namespace.project.name

    @property
    def dir(self) -> Path:
        return self._namespace.project.dir

    @property
    def output(self) -> Path:
        """The folder that outputs go under: `project.output` of expressions."""
        return self._output

    @property
    def config_name(self) -> str:
        """The selected config, without `.yaml`."""
        namespace = self._namespace
        return namespace.config.path.relative_to(namespace.project.configs).as_posix().removesuffix(".yaml")

    @property
    def config_path(self) -> Path:
        return self._namespace.config.path

    @property
    def description(self) -> str:
        """The selected config's own line."""
        return self._namespace.config.description

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the config is merged from, the base first."""
        return self._namespace.config.order

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The declared parameters, parents' first. A default that cannot be computed here counts as none."""
        found = {}
        for name, declaration in self._namespace.config.declarations.items():
            try:
                value, is_required = self._namespace.value(name), False
            except Problems:
                value, is_required = None, declaration.default is None and name not in self._args
            kind = declaration.type or type_of(value)
            found[name] = Parameter(
                name,
                kind,
                declaration.is_nullable,
                value,
                is_required,
                declaration.choices,
                declaration.min,
                declaration.max,
                declaration.help,
                declaration.place,
            )
        return found

    def argument(self, name: str) -> Any:
        """The value of a parameter. Raises ConfigError."""
        if name not in self._namespace.config.declarations:
            raise problem(None, f"no parameter {name!r}")
        return self._namespace.value(name)

    def targets(self) -> list[str]:
        """The names of the public targets, in order."""
        return [str(name) for name in self._namespace.tree if not name.startswith("_")]

    def has(self, target: str) -> bool:
        """True when the config has the target, public or not."""
        return target in self._namespace.tree

    def plain_arguments(self, target: str) -> dict[str, Any]:
        """The arguments by name of the call that a target is, without building anything: those that are plain data.

        Empty for a target that is no call. Raises ConfigError.
        """
        node = self._namespace.target(target)
        while isinstance(node, Reference):
            node = node.target
        found = {}
        for name, argument in node.arguments if isinstance(node, Call) else ():
            with suppress(NotPlainError):
                found[name] = plain_value(argument, set())
        return {name: value for name, value in found.items() if name is not None}

    def session(self, given: Mapping[str, Any] | None = None) -> Session:
        """A new session: singletons are shared by all that it builds."""
        return Session(self._namespace, given or {})

    def build(self, target: str | Sequence[str], given: Mapping[str, Any] | None = None) -> Any:
        """The object of a target, or a list of several, in a session of their own."""
        return self.session().build(target, given)

    def show(self, target: str | None = None, origin: bool = False) -> str:
        """The resolved config as YAML to read and `diff`: one target, or parameters and all. Raises ConfigError."""
        names = [str(name) for name in self._namespace.tree] if target is None else [target]
        for name in names:
            if name not in self._namespace.tree:
                self._namespace.target(name)
        return show(self._namespace, names, with_args=target is None, origin=origin)

    @property
    def digest(self) -> str:
        """Equal for equal resolved configs, those of other projects that this one uses included. Raises ConfigError."""
        return digest(self._namespace)

    def graph(self, format: str = "mermaid") -> str:
        """What is built from what, as `mermaid` or `dot` source. Raises ConfigError."""
        problems = Collector()
        roots: list[Node] = []
        for name in self.targets():
            tag = self._namespace.tree.items[self._namespace.tree.key(name)].tag
            with problems.collecting():
                if tag is None or tag.name != "project":
                    roots.append(self._namespace.target(name))
        problems.raise_any()
        projects = {key: each.project.name for key, each in self._namespace.context.instances.items()}
        return draw(roots, projects, format)

    def check(self) -> list[str]:
        """Imports every SPEC and binds every argument; builds nothing. Returns notes, such as unused parameters.

        Raises ConfigError with every problem.
        """
        return [str(note) for note in check_config(self._namespace)]

    def code(self, target: str | Sequence[str], inputs: Iterable[str] = (), freeze: Iterable[str] | None = None) -> str:
        """Python whose `construct(*inputs)` builds what `build(target, given=inputs)` builds.

        With inputs, a parameter reached other than through one is an error unless `freeze` names it: the code would
        hold its value of today. Without inputs everything is frozen. Raises ConfigError.
        """
        names = [target] if isinstance(target, str) else list(target)
        inputs = list(inputs)
        frozen = (None if not inputs else []) if freeze is None else list(freeze)
        return generate(self._namespace, names, inputs, frozen, Place(f"code of {', '.join(names)}")).text


def _flag(name: str) -> Place:
    return Place(f"--{name.replace('_', '-')}")
