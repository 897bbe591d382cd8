"""Expressions: they compute what Python computes, refuse the rest, and are late when they must be."""

import ast
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather import Project
from forgather.config.expressions import Expression, late_path, split_template
from forgather.config.problems import Problems
from forgather.config.tree import Place
from forgather.errors import ConfigError

HERE = Place("/here/f.yaml", 1, 1)
NAMES: dict[str, Any] = {"a": 3, "b": 2.5, "c": [1, 2, 3], "d": {"k": 7}, "e": "text", "f": False}
FUNCTIONS = {name: getattr(math, name) for name in ("ceil", "floor", "sqrt", "log2")}


def value_of(text: str) -> Any:
    expression = Expression(text, HERE)
    return expression.evaluate(lambda chain: eval(ast.unparse(chain.node), {**NAMES}), late_path)


_OPERATORS = ["+", "-", "*", "/", "//", "%", "==", "!=", "<", "<=", ">", ">=", "and", "or", "in", "not in"]
_CALLS = ["abs", "len", "ceil", "float", "str", "bool"]
ATOMS = st.sampled_from(["a", "b", "c[0]", "c[-1]", 'd["k"]', "1", "2.5", "True", "None", "'x'", "e", "f", "c"])


def combined(below: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.sampled_from(_OPERATORS)
    return (
        st.tuples(below, binary, below).map(lambda parts: f"({parts[0]} {parts[1]} {parts[2]})")
        | st.tuples(below, below, below).map(lambda parts: f"({parts[0]} if {parts[1]} else {parts[2]})")
        | below.map(lambda part: f"(not {part})")
        | below.map(lambda part: f"(-{part})")
        | st.tuples(below, below, below).map(lambda parts: f"({parts[0]} < {parts[1]} <= {parts[2]})")
        | st.tuples(st.sampled_from(["min", "max"]), below, below).map(lambda p: f"{p[0]}({p[1]}, {p[2]})")
        | st.tuples(st.sampled_from(_CALLS), below).map(lambda p: f"{p[0]}({p[1]})")
        | st.lists(below, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
    )


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.recursive(ATOMS, combined, max_leaves=6))
def test_an_expression_is_worth_what_python_says(text: str):
    try:
        expected = eval(text, {**NAMES, **FUNCTIONS})
    except (TypeError, ValueError, ArithmeticError, IndexError):
        with pytest.raises(Problems, match="has no value"):
            value_of(text)
        return
    assert repr(value_of(text)) == repr(expected)


@pytest.mark.parametrize(
    "text",
    [
        "lambda: 1", "[x for x in c]", "a := 1", "c[0:1]", "f'{a}'", "a.__class__()", "print(a)", "open('x')", "a | 1",
        "a @ a", "max(*c)", "round(a, ndigits=1)", "{**d}", "{1, 2}", "a is None", "...", "b'x'", "await a", "1j",
        "(yield)", "__import__('os')", "~a", "a << 1",
    ],
)  # fmt: skip
def test_nothing_else_is_part_of_expressions(text: str):
    with pytest.raises(Problems) as caught:
        Expression(text, HERE)
    assert "/here/f.yaml:1:1" in str(caught.value)
    assert "fix:" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain", ["plain"]),
        ("", [""]),
        ("${a}", ["<a>"]),
        ("x${a}y${b}", ["x", "<a>", "y", "<b>"]),
        ("$${a}", ["${a}"]),
        ("cost $5 ${a}", ["cost $5 ", "<a>"]),
        ("$$${a}", ["$${a}"]),
        ('${d["}"]}!', ['<d["}"]>', "!"]),
        ("${ {'a': {}} }", ["< {'a': {}} >"]),
    ],
)
def test_templates(text: str, parts: list[str]):
    found = split_template(text, HERE)
    assert [part if isinstance(part, str) else f"<{part.text}>" for part in found] == parts


def test_a_template_that_does_not_end():
    with pytest.raises(Problems, match=r"no } ends '\$\{a \+ 1'"):
        split_template("x ${a + 1", HERE)


Load = Callable[..., Project]


def test_a_branch_that_is_not_taken_may_be_wrong(load: Load):
    project = load("a: {x: 1}\nmain:\n- ${a.y if false else 2}\n- ${'y' in a and a.y}\nbad: ${a.y}")
    assert project.build("main") == [2, False]
    with pytest.raises(ConfigError, match=r"'a' \(configs/main.yaml:1:4\) has no 'y'"):
        project.build("bad")


def test_an_argument_that_is_written_is_early_and_an_attribute_late(load: Load):
    project = load(
        """
        tool: !singleton:types:SimpleNamespace {size: 3, inner: {deep: 4}}
        early: ${tool.size + tool.inner["deep"]}
        late: ${len(tool.__dict__) + 1}
        text: has ${tool.size} and ${len(tool.__dict__)}
        """
    )
    assert "early: 7\n" in project.show("early")
    assert "${" in project.show("late")
    assert [project.build(name) for name in ("early", "late", "text")] == [7, 3, "has 3 and 2"]


def test_late_values_must_be_plain_data(load: Load):
    project = load("tool: !singleton:types:SimpleNamespace\nmain: ${tool}\nother: ${tool.nothing}")
    with pytest.raises(ConfigError, match=r"main.yaml:2:7: the expression gave a SimpleNamespace\n  fix: .* !ref"):
        project.build("main")
    with pytest.raises(ConfigError, match=r"\$\{tool.nothing\} has no value"):
        project.build("other")


def test_a_given_target_is_read_by_attribute_and_item(load: Load):
    project = load("hf: {size: 4, rope: {theta: 1}}\nmain: ['${hf.size // 2}', '${hf.rope[\"theta\"]}']")
    mine = SimpleNamespace(size=10, rope={"theta": 5})
    assert project.build("main") == [2, 1]
    assert project.build("main", given={"hf": mine}) == [5, 5]
    names: dict[str, Any] = {}
    exec(project.code("main", inputs=["hf"]), names)
    assert names["construct"](mine) == [5, 5]
    with pytest.raises(ConfigError, match='write \\["name"\\] for a key of a dict'):
        project.build("main", given={"hf": {"size": 10}})


def test_env_is_early(load: Load, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORGATHER_TEST", "7")
    text = "tool: !singleton:dict\nmain: ${int(env('FORGATHER_TEST'))}\nlate: ${len(tool) + int(env('FORGATHER_TEST'))}"
    project = load(text)
    assert project.build("main") == 7
    with pytest.raises(ConfigError, match="env\\(\\) is early"):
        project.build("late")


def test_paths_in_late_expressions_start_from_the_file_too(load: Load):
    project = load("tool: !singleton:types:SimpleNamespace {x: [a]}\nmain: ${path('../' + tool.__dict__['x'][0])}")
    assert project.build("main") == str(Path.cwd() / "a")
    names: dict[str, Any] = {}
    exec(project.code("main"), names)
    assert names["construct"]() == str(Path.cwd() / "a")


def test_chains_of_references_and_data_in_circles(load: Load, refused: Callable[..., str]):
    assert "a circle: a (configs/main.yaml:1:4) -> b" in refused("a: !ref b\nb: !ref a")
    assert "a circle" in refused("a: !ref b.x\nb: !ref a.x")
    assert "a circle" in refused("a: {x: {y: !ref a }}")
    assert "a circle" in refused("a: !singleton:dict {x: '${len(a)}'}")
    assert "a circle" in refused("f: !function {params: [i], result: !singleton:dict {g: !ref f }}")
    assert "a circle" in refused("a: !code {target: a}")
    # These look like circles and are none.
    assert load("a: {x: 1, y: '${a.x}', z: !ref a.y }").build("a") == {"x": 1, "y": 1, "z": 1}
    assert load("alias: !ref tool\ntool: !singleton:dict {x: 1, y: '${alias.x}'}").build("alias") == {"x": 1, "y": 1}


def test_a_parameter_of_a_function_hides_what_is_outside(load: Load):
    project = load("args: {i: 1}\nmain: !function {params: [i], result: '${i * 10}'}\nother: ${i}")
    assert project.build("main")(5) == 50
    assert project.build("other") == 1


def test_config_and_project_are_known(refused: Callable[..., str]):
    said = refused("a: ${project.nmae}\nb: !ref project.name")
    assert "nothing is called 'project.nmae'\n  fix: did you mean 'project.name'?" in said
    assert "'project' is known in expressions alone" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"a".upper', "the expression gave a builtin_function_or_method"),
        ("{1: 2}", "the expression gave a dict with keys that are no text"),
        ("-" * 3000 + "1", "is nested too deeply"),
        ("1+" * 3000 + "1", "is nested too deeply"),
        ("[0] * 10 ** 18", "has no value: MemoryError"),
        ("1}${10 ** 5000", "the expression gave no text: Exceeds the limit"),
    ],
)
def test_what_is_no_plain_data_or_too_much_is_told_with_its_place(load: Callable[..., Project], text: str, said: str):
    with pytest.raises(ConfigError, match=r"^configs/main.yaml:1:7: ") as caught:
        load(f"main: '${{{text}}}'\n").build("main")
    assert said in str(caught.value)
