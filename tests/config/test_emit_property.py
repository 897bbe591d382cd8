"""Generated code is the reference semantics: for generated graphs, running it equals building.

Equal are the results, which of their parts are one object, and the log of constructions, arguments included.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from forgather.config.build import Builder
from forgather.config.context import Context
from forgather.config.emit import emit
from forgather.config.files import read_project
from forgather.config.inherit import Loader
from forgather.config.nodes import Node
from forgather.config.problems import Problems
from forgather.config.resolve import Namespace
from forgather.config.tree import Place
from tests.config import recorder

MODULE = "tests.config.recorder"
CONSTRUCTORS = ("Thing", "Thing", "Thing.Inner", "Mutating", "nothing")
OTHER = f"""
args: {{width: 3}}
tool: !singleton:{MODULE}:Thing
  width: ${{width}}
plain: {{a: [1, 2], b: "${{width * 2}}"}}
main: !singleton:{MODULE}:Thing
  tool: !ref tool
  late: ${{tool.size + width}}
  plain: !ref plain.a
maker: !factory:{MODULE}:Thing [!ref tool ]
"""


class Draw:
    """Draws the YAML of targets t0 .. tn; a target refers to later ones only, so nothing goes in circles."""

    def __init__(self, draw: Callable[[Any], Any], count: int) -> None:
        self.draw = draw
        self.count = count
        self.target = 0
        self.paths: dict[int, list[str]] = {}
        self.things: list[int] = []

    def below(self, limit: int) -> int:
        return int(self.draw(st.integers(0, limit - 1)))

    def one_of(self, *choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def targets(self) -> Iterator[str]:
        lines = []
        for target in reversed(range(self.count)):
            self.target = target
            self.paths[self.target] = []
            lines.append(f"t{self.target}: {self.value(3, (), root=True)}")
        yield from reversed(lines)

    def value(self, depth: int, params: tuple[str, ...], *, root: bool = False) -> str:
        kinds = ["scalar", "expression", "late", "reference", "reference"]
        if depth > 0:
            kinds += ["call", "call", "call", "factory", "function", "list", "dict", "tuple", "values", "partial"]
        kind = self.one_of(*(kinds[5:] if root and depth else kinds))
        made: str = getattr(self, f"_{kind}")(depth, params, root) + " "
        return made

    def _scalar(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        return str(self.one_of("1", "null", "true", "text", "1.5", ".inf", '"a ${1 + 1} b"', "!symbol:builtins:len"))

    def _expression(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        texts = ["${number + 1}", "${words[1]}", "n is ${number}, $${x}", "${words}", "${table.a if true else 0}"]
        return json.dumps(self.one_of(*texts))

    def _late(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        names = [f"t{each}.size" for each in self.things] + list(params)
        if not names:
            return self._expression(depth, params, root)
        a, b = self.one_of(*names), self.one_of(*names)
        return json.dumps(
            self.one_of(
                f"${{{a}}}",
                f"${{{a} * 2 + number}}",
                f"at {{{a}}}: ${{{a}}} and ${{{b}}}!",
                f"${{{a} if {b} > 1 else -{b}}}",
                f"${{[{a}, words, {b}]}}",
                f"${{max({a}, len(words), abs({b}))}}",
                f"${{ceil({a} / 2) + (1 if {b} in words else 0)}}",
                f"${{words[{a} % 2]}}",
            )
        )

    def _reference(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        names = [name for each in range(self.target + 1, self.count) for name in (f"t{each}", *self.paths[each])]
        names += [*params, "other.main", "other.tool", "other.plain", "other.maker", "again.main", "number", "words"]
        return f"!ref {self.one_of(*names)}"

    def _arguments(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        shape = self.below(4)
        count = self.below(4)
        if shape == 0:
            return "[" + ", ".join(self.value(depth - 1, params) for _ in range(count)) + "]"
        items = [(f"k{index}", self.value(depth - 1, params)) for index in range(count)]
        if shape == 1:
            star = "[" + ", ".join(self.value(depth - 1, params) for _ in range(self.below(3))) + "]"
            items.insert(self.below(len(items) + 1), ('"*"', star))
        if shape == 2:
            items.insert(self.below(len(items) + 1), ('"not a name"', self.value(depth - 1, params)))
        if root:
            self.paths[self.target] += [f"t{self.target}.{name}" for name, _ in items if name.startswith("k")]
        return "{" + ", ".join(f"{name}: {item}" for name, item in items) + "}"

    def _call(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        if self.below(5) == 0:
            return f"!singleton:{MODULE}:call_twice [{self._function(depth - 1, params, False)} ]"
        name = self.one_of(*CONSTRUCTORS)
        made = f"!singleton:{MODULE}:{name} {self._arguments(depth, params, root)}"
        if root and name in ("Thing", "Mutating"):
            self.things.append(self.target)
        return made

    def _factory(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        return f"!factory:{MODULE}:{self.one_of('Thing', 'Mutating')} {self._arguments(depth, params, root)}"

    def _partial(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        return f"!partial:{MODULE}:Thing {self._arguments(depth, params, root)}"

    def _function(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        own = tuple(f"p{depth}{index}" for index in range(self.below(3)))
        if root and self.below(3) == 0:  # a body that refers to its own parts
            item = f"!singleton:{MODULE}:Thing {{k0: {self.value(depth - 1, params + own)}}}"
            again = f"!ref t{self.target}.result.k0"
            body = f"!factory:{MODULE}:Thing {{k0: {item}, k1: {again} , k2: {self.value(depth - 1, params + own)}}}"
        else:
            body = self.value(depth - 1, params + own)
        return f"!function {{params: [{', '.join(own)}], result: {body} }}"

    def _list(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        return "[" + ", ".join(self.value(depth - 1, params) for _ in range(self.below(4))) + "]"

    def _tuple(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        return f"!tuple {self._list(depth, params, root)}"

    def _dict(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        items = [f"k{index}: {self.value(depth - 1, params)}" for index in range(self.below(4))]
        if root:
            self.paths[self.target] += [f"t{self.target}.k{index}" for index in range(len(items))]
        return "{" + ", ".join(items) + "}"

    def _values(self, depth: int, params: tuple[str, ...], root: bool) -> str:
        return f"!values {self._dict(depth, params, root)}"


@st.composite
def configs(draw: Callable[[Any], Any]) -> tuple[str, list[str], list[str]]:
    """A config, the targets to build, and those to give."""
    count = draw(st.integers(2, 7))
    lines = list(Draw(draw, count).targets())
    roots = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=2, unique=True))
    inputs = draw(st.lists(st.integers(0, count - 1), max_size=2, unique=True))
    others = [
        "args: {number: 4, words: [1, two]}",
        "table: {a: 1}",
        "other: !project {dir: other}",
        "again: !project {dir: other, args: {width: 3}}",
        f"mine: !project {{dir: other, with: {{tool: !singleton:{MODULE}:Thing [7] }}}}",
    ]
    return "\n".join([*others, *lines]), [f"t{each}" for each in roots], [f"t{each}" for each in inputs]


def check_config(folder: Path, text: str, roots: list[str], inputs: list[str]) -> None:
    file = folder / "configs" / "main.yaml"
    file.write_text(text.replace("dir: other", f"dir: {folder / 'other'}"))
    loader = Loader()
    project = read_project(folder)
    context = Context(loader, folder)
    namespace = Namespace(context, project, loader.load(file, project.library), {}).giving(inputs, Place("given"))
    try:
        nodes: list[Node] = [namespace.target(name) for name in roots]
    except Problems as error:
        assume("below a !partial" not in str(error))
        assume("it takes a list" not in str(error))
        raise
    built = run(lambda objects: build_all(nodes, objects), inputs)
    source = emit(nodes, inputs)

    def run_source(objects: dict[str, Any]) -> Any:
        names: dict[str, Any] = {}
        exec(compile(source, "<emitted>", "exec"), names)
        made = names["construct"](**objects)
        return made if len(nodes) > 1 else [made]

    emitted = run(run_source, inputs)
    assert emitted == built, f"{text}\n\n{source}"


def build_all(nodes: list[Node], objects: dict[str, Any]) -> list[Any]:
    builder = Builder(objects)
    return [builder.build(node) for node in nodes]


def run(build: Callable[[dict[str, Any]], Any], inputs: list[str]) -> tuple[Any, list[Any]]:
    """The picture of the result, and the log."""
    recorder.LOG.clear()
    given_objects: dict[str, Any] = {name: recorder.Handed(name) for name in inputs}
    try:
        result = recorder.picture(build(given_objects))
    except (TypeError, Problems) as error:  # functions given to constructors that cannot take them: both must refuse
        result = type(error).__name__ if isinstance(error, TypeError) else str(error)
    return result, list(recorder.LOG)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        for each in (path, path / "other"):
            (each / "configs").mkdir(parents=True)
            (each / "project.yaml").write_text("default: main\n")
        (path / "other/configs/main.yaml").write_text(OTHER)
        yield path


COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=150, **COMMON)
@given(configs())
def test_emitted_code_equals_building(folder: Path, config: tuple[str, list[str], list[str]]) -> None:
    check_config(folder, *config)


@pytest.mark.soak
@settings(max_examples=5000, **COMMON)
@given(configs())
def test_emitted_code_equals_building_at_length(folder: Path, config: tuple[str, list[str], list[str]]) -> None:
    check_config(folder, *config)
