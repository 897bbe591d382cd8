"""Parameters: declarations, their own rule of merging, types, bounds, and what flags mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgather import Project
from forgather.errors import ConfigError

Load = Callable[..., Project]
Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("kind", "value", "held"),
    [
        ("int", 3, 3),
        ("int?", None, None),
        ("float", 3, 3.0),
        ("float", 2.5, 2.5),
        ("str", "x", "x"),
        ("str?", None, None),
        ("bool", True, True),
        ("path", "/a/../b", "/b"),
        ("yaml", {"a": [1]}, {"a": [1]}),
        ("yaml", None, None),
        ("list", [1, "a"], [1, "a"]),
    ],
)
def test_values_that_fit(load: Load, kind: str, value: Any, held: Any):
    project = load(f"args: {{x: {{type: {kind}}}}}\nmain: ${{x}}", args={"x": value})
    if kind == "yaml" and value is None:
        return
    assert project.build("main") == held
    assert type(project.build("main")) is type(held)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int", 3.5), ("int", True), ("int", "3"), ("int", None), ("float", "x"), ("float", False), ("str", 3),
        ("bool", 1), ("bool", "true"), ("list", "ab"), ("path", 3), ("int?", "x"), ("float", float("nan")),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(load: Load, kind: str, value: Any):
    project = load(f"args: {{x: {{type: {kind}}}}}\nmain: ${{x}}", args={"x": value})
    with pytest.raises(ConfigError, match=r"--x: 'x' is of type " + kind.replace("?", r"\?")):
        project.build("main")


def test_declarations_merge_key_by_key_and_values_restate_the_default(write: Callable[..., Path]):
    write(
        base="args: {a: {type: int, default: 1, min: 0, help: The a}, b: 2, c: x}",
        main="extends: base.yaml\nargs: {b: 3, a: {default: 5, max: 9}, d: true}",
    )
    parameters = Project(".").parameters
    assert list(parameters) == ["a", "b", "c", "d"]
    a = parameters["a"]
    assert (a.type, a.default, a.min, a.max, a.help) == ("int", 5, 0, 9, "The a")
    assert str(a.place) == "configs/base.yaml:1:8"
    assert (parameters["b"].default, parameters["d"].type) == (3, "bool")


def test_required_nullable_and_lazy(load: Load):
    project = load("args: {need: {type: str}, opt: {type: int?, default: null}}\nmain: ${need}\nother: ${opt}")
    assert project.parameters["need"].is_required
    assert project.parameters["opt"].is_nullable
    assert project.build("other") is None
    with pytest.raises(
        ConfigError, match=r"main.yaml:1:8: the parameter 'need' has no value\n  fix: give it by --need"
    ):
        project.build("main")
    assert project.replaced(args={"need": "x"}).build("main") == "x"
    assert "what needs it was not checked" in project.check()[0]


def test_defaults_are_expressions_over_other_parameters(load: Load):
    text = "args: {a: 2, b: '${a * 3}', c: {type: list, default: ['${a}', '${b}']}}\nmain: ${c}"
    assert load(text).build("main") == [2, 6]
    assert load(text, args={"a": 5}).build("main") == [5, 15]
    assert load(text).parameters["b"].type == "int"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("{a: null}", "null does not tell the type of 'a'"),
        ("{a: {}}", "the parameter 'a' has no type"),
        ("{a: {type: itn, default: 1}}", "unknown type 'itn'\n  fix: did you mean 'int'?"),
        ("{a: {tpye: int}}", "unknown key 'tpye' in the declaration of 'a'"),
        ("{a: {type: int, min: low}}", "min must be a number"),
        ("{a: {type: str, default: x, min: 1}}", "min and max need a number"),
        ("{a: {type: int, choices: 3}}", "choices must be a list"),
        ("{a: !ref b}", "!ref in args"),
        ("{a: {type: int, default: !ref b}}", "!ref in a declaration"),
        ("{a: !delete }", "!delete of the parameter 'a'"),
        ("{len: 1}", "the parameter 'len' is a reserved name"),
        ("{a: '${b + 1}', b: '${a + 1}'}", "a circle: args.a"),
        ("{a: '${tool}'}", "a parameter's default must be plain data"),
        ("{a: {type: float, default: 2.0, max: 1}}", "'a' is 2.0, out of bounds: at most 1"),
        ("{a: {type: int, default: 20, min: 1, max: 9}}", "out of bounds: 1 to 9"),
        ("{a: {type: str, default: fats, choices: [fast, slow]}}", "did you mean 'fast'?"),
        ("{a: {type: int, default: 3, choices: [1, 2]}}", "'a' cannot be 3; it is one of 1, 2"),
        ("{a: {type: str, default: x/y, pattern: '[a-z]+'}}", "'a' cannot be 'x/y'; it does not match [a-z]+"),
        ("{a: {type: str, default: '', pattern: '[a-z]+', help: A word}}", "'a' cannot be ''"),
        ("{a: {type: str, default: x, pattern: '('}}", "pattern must be a regular expression"),
        ("{a: {type: str, default: x, pattern: 3}}", "pattern must be a regular expression"),
        ("{a: {type: int, default: 1, pattern: '1'}}", "pattern needs text, and 'a' is a int"),
        ("{a: {type: int, default: null}}", "give a value, or declare it as int?"),
    ],
)
def test_declarations_that_are_refused(refused: Refused, args: str, said: str):
    assert said in refused(f"args: {args}\ntool: !singleton:dict\n")


def test_an_unknown_argument_is_told_with_the_nearest(refused: Refused):
    said = refused("args: {hidden_size: 1}\nmain: ${hidden_size}", args={"hiden_size": 2})
    assert said == "--hiden-size: main.yaml has no parameter 'hiden_size'\n  fix: did you mean 'hidden_size'?"


def test_a_parameter_can_be_deleted(write: Callable[..., Path]):
    write(base="args: {a: 1, b: 2}", main="extends: base.yaml\nargs: {a: !delete }")
    assert list(Project(".").parameters) == ["b"]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "3", 3),
        ("int?", "null", None),
        ("float", "1e-3", 1e-3),
        ("str", "3", "3"),
        ("str?", "null", None),
        ("str", "null", "null"),
        ("str", "${x}", "${x}"),
        ("bool", "true", True),
        ("list", "[1, 2]", [1, 2]),
        ("yaml", "{a: 1}", {"a": 1}),
        ("path", "x y", "x y"),
    ],
)
def test_the_text_of_a_flag(load: Load, kind: str, text: str, value: Any):
    parameter = load(f"args: {{x: {{type: {kind}}}}}").parameters["x"]
    assert parameter.parse(text, f"--x {text}") == value


def test_text_given_for_a_parameter_is_literal(load: Load):
    assert load("args: {x: {type: str}}\nmain: ${x}", args={"x": "${y}"}).build("main") == "${y}"


def test_all_that_is_wrong_with_declarations_is_told(refused: Refused):
    said = refused(
        "args: {a: {type: int, choices: [!ref x ]}, b: {type: foo}, c: {type: int, min: 5, max: 1}}\nmain: 1"
    )
    assert "configs/main.yaml:1:33: !ref where plain data is asked for" in said
    assert "unknown type 'foo'" in said
    assert "no value of 'c' is at least 5 and at most 1" in said


def test_a_default_that_no_longer_fits_is_told_where_it_was_made_so(write: Callable[..., Path]):
    base = "args:\n  x: {type: str, default: many}\nmain: ${x}\n"
    main = "extends: base.yaml\nargs:\n  x: {type: int}\n"
    root = write(base=base, main=main)
    with pytest.raises(ConfigError, match=r"configs/main.yaml:3:3: 'x' is of type int, not 'many'"):
        Project(root).check()
    write(main=main.replace("int", "int, default: x"))
    with pytest.raises(ConfigError, match=r"configs/main.yaml:3:27: 'x' is of type int, not 'x'"):
        Project(root).check()
    with pytest.raises(ConfigError, match=r"^--x: 'x' is of type int"):
        Project(root, args={"x": "y"}).check()
