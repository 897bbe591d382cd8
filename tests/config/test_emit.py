"""What emitted source looks like, and its corners: names that collide, order, files, inputs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from forgather import Project
from forgather.errors import ConfigError
from tests.config import recorder

Load = Callable[..., Project]
R = "tests.config.recorder"


def run(source: str, *given: Any) -> Any:
    names: dict[str, Any] = {}
    exec(compile(source, "<emitted>", "exec"), names)
    return names["construct"](*given)


@pytest.fixture(autouse=True)
def _empty_log():
    recorder.LOG.clear()


def test_source_reads_like_a_program(load: Load):
    source = load(
        """
        norm: !factory:types:SimpleNamespace {size: 8}
        shared: !singleton:types:SimpleNamespace
          name: a name that is so long that the line cannot hold all of it at once
        layer: !function
          params: [layer_idx]
          result: !factory:types:SimpleNamespace
            index: ${layer_idx + 1}
            norm: !ref norm
            shared: !ref shared
        main: !singleton:types:SimpleNamespace
          layer: !ref layer
          norm: !ref norm
          text: has ${shared.__dict__}
        """
    ).code("main")
    assert source == (
        """from types import SimpleNamespace


def construct():
    norm = SimpleNamespace(size=8)
    shared = SimpleNamespace(
        name='a name that is so long that the line cannot hold all of it at once',
    )

    def layer(layer_idx):
        return SimpleNamespace(index=layer_idx + 1, norm=norm, shared=shared)

    return SimpleNamespace(
        layer=layer,
        norm=SimpleNamespace(size=8),
        text='has {}'.format(shared.__dict__),
    )
"""
    )


def test_names_never_collide(load: Load):
    text = f"""
    list: !singleton:{R}:Thing [1]
    construct: !singleton:{R}:Thing [2]
    functools: !singleton:{R}:Thing [3]
    value: !singleton:{R}:Thing [4]
    Thing: !singleton:{R}:Thing [5]
    inner: !singleton:{R}:Thing.Inner [6]
    other: !singleton:tests.config.test_emit:SimpleNamespace {{a: 1}}
    same: !singleton:types:SimpleNamespace {{a: 2}}
    sys: !singleton:../parts.py:made [!singleton:list [[1] ] ]
    main:
      - !ref list
      - !ref construct
      - !ref functools
      - !ref value
      - !ref Thing
      - !ref inner
      - !ref other
      - !ref same
      - !ref sys
      - !partial:dict {{a: !values {{b: !ref value , c: null }}}}
      - !function {{params: [list, value], result: [!ref list , !singleton:list [[2] ], !values {{a: !ref value }}]}}
    """
    project = load(text, {"parts.py": "def made(x):\n    return ('made', x)\n"})
    emitted = recorder.picture(run(project.code("main")))
    log = list(recorder.LOG)
    recorder.LOG.clear()
    assert recorder.picture(project.build("main")) == emitted
    assert log == recorder.LOG


def test_an_input_named_as_a_builtin_hides_only_itself(load: Load):
    project = load("len: 1".replace("len", "filter") + "\nmain: [!ref filter , !singleton:filter [null, [0, 1]]]\n")
    given, made = run(project.code("main", inputs=["filter"]), "mine")
    assert given == "mine"
    assert list(made) == [1]


@pytest.mark.parametrize(
    "arguments",
    [
        f'{{a: !singleton:{R}:Thing [1] , "*": [!singleton:{R}:Thing [2] ], b: !singleton:{R}:Thing [3] }}',
        f'{{a: !singleton:{R}:Thing [1] , "*": !ref xs , b: 1}}',
        f'{{"*": !ref xs , "a b": !singleton:{R}:Thing [3] , class: 1}}',
        f"[!singleton:{R}:Thing [1] , !ref shared , !singleton:{R}:Thing [!ref shared ] ]",
    ],
)
def test_order_survives_what_python_would_reorder(load: Load, arguments: str):
    text = f"xs: [!singleton:{R}:Thing [7] ]\nshared: !singleton:{R}:Thing [9]\n"
    project = load(f"{text}main: !singleton:{R}:Thing {arguments}")
    built = recorder.picture(project.build("main"))
    log = list(recorder.LOG)
    recorder.LOG.clear()
    assert recorder.picture(run(project.code("main"))) == built
    assert log == recorder.LOG


def test_positionals_from_a_parameter(load: Load):
    project = load('args: {xs: [1, 2]}\nmain: !singleton:max {"*": "${xs}"}')
    assert project.build("main") == run(project.code("main")) == 2
    project.check()


def test_several_targets_and_floats_that_have_no_literal(load: Load):
    project = load("a: .inf\nb: [-.inf, 1e-05]\nc: !singleton:dict {x: .nan}")
    a, b, c = run(project.code(["a", "b", "c"]))
    assert (a, b) == (float("inf"), [float("-inf"), 1e-05])
    assert c["x"] != c["x"]


def test_what_is_given_need_not_be_buildable(load: Load):
    project = load("hf: !singleton:no.such.module:X\nmain: !singleton:dict {a: '${hf.a}', b: !ref hf.b }")
    given = SimpleNamespace(a=1, b=[2])
    made = run(project.code("main", inputs=["hf"]), given)
    assert made == project.build("main", given={"hf": given}) == {"a": 1, "b": [2]}
    assert made["b"] is given.b
    with pytest.raises(ConfigError, match=r"'hf' .* has no 'b'"):
        project.build("main")
    with pytest.raises(ConfigError, match="'b' of what was given"):
        project.build("main", given={"hf": SimpleNamespace(a=1)})


def test_parameters_that_reach_code_are_refused_wherever_they_come_from(load: Load):
    text = """
    args: {width: 4, kind: a, other: 1}
    hf: {width: "${width}"}
    _kinds: {a: !singleton:dict , b: !singleton:list }
    _p: !project {dir: ../p, args: {n: "${other}"}}
    model: !singleton:dict
      direct: ${width + 1}
      through: ${hf.width}
      kind: !ref _kinds.${kind}
      late: ${hf.width + width}
      nested: !ref _p.main
    """
    files = {"p/project.yaml": "", "p/configs/m.yaml": "args: {n: 2}\nmain: ['${n}']"}
    project = load(text, files)
    with pytest.raises(ConfigError) as caught:
        project.code("model", inputs=["hf"])
    said = str(caught.value)
    assert said.count("would hold the value of the parameter 'width'") == 2
    assert said.count("'kind'") == said.count("'other'") == 1
    frozen = project.code("model", inputs=["hf"], freeze=["width", "kind", "other"])
    assert run(frozen, SimpleNamespace(width=10)) == {"direct": 5, "through": 10, "kind": {}, "late": 14, "nested": [1]}
    assert run(project.code("model")) == project.build("model")


def test_parameters_named_like_what_the_code_imports(load: Load):
    project = load(
        """
        math: {x: 4.0}
        inner: !function
          params: [os, functools, builtins, dict]
          result: ["${join(os, 'a')}", !partial:dict {k: "${ceil(functools)}"}, "${sqrt(math.x)}"]
        main: !singleton:list [["${sqrt(math.x)}", !ref inner ]]
        """
    )
    given = SimpleNamespace(x=9.0)
    built, emitted = project.build("main", given={"math": given}), run(project.code("main", inputs=["math"]), given)
    assert emitted[0] == built[0] == 3.0
    for function in (built[1], emitted[1]):
        joined, partial, root = function("b", 1.5, None, None)
        assert (joined, partial(), root) == ("b/a", {"k": 2}, 3.0)


def test_keywords_that_python_does_not_take_as_they_are(load: Load):
    project = load("main: !singleton:dict {__debug__: 1, class: 2, '\ufb01': 3, é: 4}\n")
    assert run(project.code("main")) == project.build("main") == {"__debug__": 1, "class": 2, "\ufb01": 3, "é": 4}


def test_an_input_named_twice_is_one_parameter(load: Load):
    project = load("a: 1\nmain: [!ref a ]\ncode: !code {target: main, inputs: [a, a]}\n")
    assert run(project.build("code"), 5) == run(project.code("main", inputs=["a", "a"]), 5) == [5]
