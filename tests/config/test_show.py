"""Looking at a config: show, digest, graph, and that looking is quick and needs nothing heavy."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from forgather import Project
from forgather.errors import ConfigError

Load = Callable[..., Project]
TEXT = """\
args: {width: 4, name: {type: str, default: "a: b"}}
main: !singleton:dict
  early: ${width * 2}
  late: ${len(tool)}
  text: ${name}
  list: [1, {x: [], y: {}}]
  made: !function {params: [i], result: {at: "${i}", w: "${width}"}}
tool: !factory:dict
switch: !ref _kinds.${"a" if width > 3 else "b"}
_kinds: {a: !symbol:torch:bfloat16 , b: null}
"""


def test_show_settles_what_is_known(load: Load):
    assert load(TEXT).show() == (
        """args:
  width: 4
  name: "a: b"
main: !singleton:dict
  early: 8
  late: "${len(tool)}"
  text: "a: b"
  list:
    - 1
    -
      x: []
      y: {}
  made: !function
    params:
      - i
    result:
      at: "${i}"
      w: 4
tool: !factory:dict
switch: !ref _kinds.a
_kinds:
  a: !symbol:torch:bfloat16
  b: null
"""
    )


def test_show_tells_where_each_line_comes_from(write: Callable[..., Path]):
    write(base="args: {a: 1}\nmain: {x: 1, y: '${a}'}", main="extends: base.yaml\nmain: {x: 2}")
    shown = Project(".", args={"a": 5}, words=["main.x=3"]).show(origin=True)
    places = [line.split("# ")[-1] for line in shown.splitlines()]
    assert places == [
        "args:", "--a", "configs/base.yaml:2:7", "main.x=3", "configs/base.yaml:2:17 <- --a",
    ]  # fmt: skip


def test_show_one_target_and_a_wrong_one(load: Load):
    project = load(TEXT)
    assert project.show("tool") == "tool: !factory:dict\n"
    with pytest.raises(ConfigError, match="did you mean 'tool'"):
        project.show("tol")


def test_the_digest_sees_every_value_and_other_projects_and_nothing_else(load: Load):
    files = {"p/project.yaml": "", "p/configs/m.yaml": "main: 1\n"}
    text = "args: {a: 1}\n_p: !project {dir: ../p}\nmain: ['${a}', !ref _p.main ]"
    digest = load(text, files).digest
    assert load(text.replace("a: 1}", "a:  1} # comment"), files).digest == digest
    assert load(text, files, args={"a": 1}).digest == digest
    assert load(text, files, args={"a": 2}).digest != digest
    assert load(text, {**files, "p/configs/m.yaml": "main: 2\n"}).digest != digest


def test_graphs(load: Load):
    project = load(
        "a: !singleton:dict {x: !ref b , y: [!ref c ]}\nb: !factory:dict\nc: !partial:print\n_p: !project {dir: ..}"
    )
    assert project.graph() == (
        "graph LR\n"
        '  n0["a<br/>!singleton:dict"]\n  n1["b<br/>!factory:dict"]\n  n2["c<br/>!partial:print"]\n'
        '  n0 -->|"x"| n1\n  n0 -->|"y"| n2\n'
    )
    assert '  n0 -> n1 [label="x"];' in project.graph("dot")
    files = {"p/project.yaml": "name: words", "p/configs/m.yaml": "main: !singleton:dict\n"}
    inner = load("_p: !project {dir: ../p}\nmain: !singleton:dict {x: !ref _p.main }", files).graph()
    assert '  n1["words: main<br/>!singleton:dict"]' in inner
    with pytest.raises(ConfigError, match="did you mean 'dot'"):
        project.graph("dto")


def test_looking_imports_nothing_heavy_and_no_spec(load: Load):
    load("main: !singleton:torch:Tensor\nother: !singleton:no.such.module:X {a: !ref main }")
    program = (
        "import sys; from forgather import Project; p = Project('.'); p.show(origin=True); p.targets(); p.graph();"
        "p.digest; p.code('other'); p.parameters; heavy = ['torch', 'numpy', 'transformers', 'dataclasses'];"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_errors_travel_between_processes():
    import pickle

    from forgather.config.problems import Problem, Problems
    from forgather.config.tree import Place

    error = Problems([Problem(Place("/f.yaml", 1, 2), "wrong", "mend it"), Problem(None, "more")])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "2 problems in the configuration\n/f.yaml:1:2: wrong\n  fix: mend it\nmore"
    assert again.problems == error.problems


def test_an_expression_tells_where_its_parameters_got_their_values(write: Callable[..., Path]):
    other = {"other/project.yaml": "default: m", "other/configs/m.yaml": "args: {n: 1}\nmain: '${n}'\n"}
    base = """\
        args: {a: 1, b: 2, kind: x}
        _k: {x: 1}
        p: !project {dir: ../other, args: {n: 5}}
        one: ${a}
        two: ${a + b}
        type: !ref _k.${kind}
        inner: ${p.main}
        """
    write(other, base=base, main="extends: base.yaml\nargs: {b: 3}\n")
    lines = Project(".", args={"a": 5}).show(origin=True).splitlines()
    origins = {line.split(":")[0]: line.partition("# ")[2] for line in lines}
    assert origins["one"] == "configs/base.yaml:4:6 <- --a"
    assert origins["two"] == "configs/base.yaml:5:6 <- --a, configs/main.yaml:2:11"
    assert origins["type"] == "configs/base.yaml:6:7 <- configs/base.yaml:1:26"
    assert origins["inner"] == "configs/base.yaml:7:8 <- configs/base.yaml:3:39"


def test_show_resolves_below_a_key_named_set(load: Load):
    text = "args: {a: 1}\nmain: {set: {x: '${a}'}}\n_p: !project {dir: ., set: {main.set.x: '${a + 1}'}}\n"
    shown = load(text, {"configs/project.yaml": "configs: ."}).show()
    assert "    x: 1\n" in shown
    assert "    main.set.x: 2\n" in shown


def test_projects_that_name_one_another_have_a_digest(load: Load):
    other = {"other/project.yaml": "default: m", "other/configs/m.yaml": "q: !project {dir: ../..}\nmain: !ref q.x\n"}
    project = load("p: !project {dir: ../other}\nx: 1\nmain: !ref p.main\n", other)
    assert project.build("main") == 1
    assert project.digest != load("p: !project {dir: ../other}\nx: 2\nmain: !ref p.main\n", other).digest
