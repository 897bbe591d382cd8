"""Nodes and sessions: what is shared, what is fresh, in which order, and what is said when it fails."""

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgather import Project
from forgather.config.problems import Problems
from forgather.errors import ConfigError
from tests.config import recorder

Load = Callable[..., Project]
Refused = Callable[..., str]
R = "tests.config.recorder"


@pytest.fixture(autouse=True)
def _empty_log():
    recorder.LOG.clear()


def test_only_what_is_asked_for_is_built_in_written_order(load: Load):
    project = load(
        f"""
        unused: !singleton:{R}:Thing [unused]
        last: !singleton:{R}:Thing [last]
        first: !singleton:{R}:Thing [first]
        main: !singleton:{R}:Thing
          a: !singleton:{R}:Thing
            inner: !ref first
          b: !ref last
          c: !ref first
        """
    )
    project.build("main")
    assert [entry[1] or list(entry[2]) for entry in recorder.LOG] == [
        ["first"] if False else ("first",), ["inner"], ("last",), ["a", "b", "c"],
    ]  # fmt: skip


def test_none_is_built_once_like_any_value(load: Load):
    project = load(f"a: !singleton:{R}:nothing [1]\nmain: [!ref a , !ref a ]")
    session = project.session()
    assert session.build("main") == [None, None]
    assert session.build("a") is None
    assert len(recorder.LOG) == 1
    project.build("main")
    assert len(recorder.LOG) == 2


def test_sessions_share_singletons_and_refuse_what_comes_too_late(load: Load):
    project = load(f"a: !singleton:{R}:Thing\nb: !singleton:{R}:Thing [!ref a ]\nc: !singleton:{R}:Thing [7]")
    session = project.session()
    b = session.build("b")
    assert session.build("a") is b.args[0]
    assert session.build("c", given={}) is session.build(["c"])[0]
    with pytest.raises(ConfigError, match="'a' is given, but what was built already reached it"):
        session.build("b", given={"a": 1})
    fresh = project.session(given={"a": 1})
    c = fresh.build("c")
    assert fresh.build("b").args == (1,)
    assert fresh.build("c", given={"a": 1}) is c
    with pytest.raises(ConfigError, match="given another object"):
        fresh.build("b", given={"a": 2})


def test_giving_later_keeps_what_was_built(load: Load):
    project = load(f"a: !singleton:{R}:Thing\nb: !singleton:{R}:Thing\nmain: [!ref a , !ref b ]")
    session = project.session()
    a = session.build("a")
    assert session.build("main", given={"b": 5}) == [a, 5]


def test_unknown_targets_are_told_together_with_the_nearest(load: Load):
    project = load("tokenizer: 1\nmain: 2\n_private: 3")
    with pytest.raises(ConfigError) as caught:
        project.build(["tokeniser", "mian"])
    assert "did you mean 'tokenizer'?" in str(caught.value)
    assert "did you mean 'main'?" in str(caught.value)
    with pytest.raises(ConfigError, match="no target 'tok' that could be given"):
        project.build("main", given={"tok": 1})
    assert project.targets() == ["tokenizer", "main"]
    assert project.has("_private")


def test_plain_data_is_fresh_at_each_place(load: Load):
    project = load(
        "data: [[1], {a: 2}]\nmain: [!ref data , !ref data ]\nargs: {x: {type: yaml, default: [1]}}\n"
        "xs: ['${x}', '${x}']"
    )
    a, b = project.build("main")
    assert a == b
    assert a is not b
    assert a[0] is not b[0]
    x, y = project.build("xs")
    assert x == y
    assert x is not y


def test_partials_build_their_arguments_once(load: Load):
    project = load(f"main: !partial:{R}:Thing {{a: !singleton:{R}:Thing }}")
    made = project.build("main")
    assert isinstance(made, functools.partial)
    assert made().kwargs["a"] is made().kwargs["a"]


@pytest.mark.parametrize(
    "below",
    [
        "{a: !factory:dict }",
        "{a: [{b: !factory:dict }]}",
        "{a: !ref f }",
        "[!ref alias ]",
        '{"*": [!ref f ]}',
        "{a: !values {x: !ref f }}",
    ],
)
def test_a_factory_below_a_partial_is_refused(refused: Refused, below: str):
    said = refused(f"f: !factory:dict\nalias: !ref f\nmain: !partial:dict {below}")
    assert "below a !partial would be built once\n  fix: use !function" in said


def test_a_factory_below_a_singleton_below_a_partial_is_that_singletons(load: Load):
    load("main: !partial:dict {a: !singleton:dict {b: !factory:dict }}").build("main")


def test_functions_within_functions(load: Load):
    project = load(
        f"""
        outside: !singleton:{R}:Thing [outside]
        maker: !factory:{R}:Thing [maker]
        main: !function
          params: [i]
          result: !factory:{R}:Thing
            own: !singleton:{R}:Thing ["${{i}}"]
            inner: !function
              params: [j]
              result: ["${{i * 10 + j}}", !ref main.result.own , !ref outside , !ref maker ]
        """
    )
    made = project.build("main")
    assert [entry[1] for entry in recorder.LOG] == [("outside",), ("maker",)]  # before, once
    a, b = made(1), made(2)
    one, own, outside, maker = a.kwargs["inner"](5)
    assert (one, own, outside) == (15, a.kwargs["own"], b.kwargs["inner"](0)[2])
    assert maker is b.kwargs["inner"](0)[3]
    assert a.kwargs["own"] is not b.kwargs["own"]


def test_what_is_inside_a_function_does_not_exist_outside(refused: Refused):
    text = "f: !function {params: [i], result: {a: 1, b: !function {params: [], result: {c: 1}}}}\n"
    assert "'f' is a function; nothing inside it exists outside" in refused(text + "x: !ref f.result.a")
    assert "nothing is called 'i'" in refused(text + "x: !ref i")
    assert "nothing inside it exists outside" in refused(text + "x: ${f.result.a}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!function {params: [i]}", "!function without result"),
        ("!function [1]", "!function takes a mapping"),
        ("!function {parms: [i], result: 1}", "unknown key 'parms' of !function\n  fix: did you mean 'params'?"),
        ("!function {params: i, result: 1}", "params must be a list of names"),
        ("!function {params: [i, i], result: 1}", "the parameter 'i' is there twice"),
        ("!function {params: [max], result: 1}", "the parameter 'max' is a reserved name"),
        ("!function {params: [1], result: 1}", "the parameter 1 is no name"),
        ("!values [1]", "!values takes a mapping"),
        ("!tuple {a: 1}", "!tuple takes a list"),
        ("!ref", "!ref needs a path"),
        ("!ref [a]", "!ref needs a path"),
        ("!ref a..b", "is no path"),
        ('!ref "${len(tool)}"', "where it leads must be known before building"),
        ("!singleton:dict 5", "the arguments of !singleton:dict must be a mapping or a list"),
        ("!symbol:dict {a: 1}", "!symbol:dict takes nothing"),
        ('!singleton:dict {"*": 5}', "it takes a list"),
        ("!singleton:dcit", "'dcit' is no builtin\n  fix: did you mean 'dict'?"),
        ("!singleton:a-b:C", "'a-b' names no module"),
        ("!singleton:a:C-D", "'C-D' names no symbol"),
        ("!singleton:./parst.py:C", "no file './parst.py'\n  fix: did you mean 'parts.py'?"),
        ("!project {dir: ..}", "is a project, and a project is no object"),
        ("!project {config: x}", "!project without dir"),
        ("!project [1]", "!project takes a mapping"),
        ("!project {dri: ..}", "unknown key 'dri' of !project"),
        ("!project {dir: .}", "a project is a folder with a project.yaml"),
        ("!project {dir: .., config: mian}", "has no config 'mian'"),
        ("!project {dir: .., args: {x: '${tool}'}}", "a project's argument must be plain data"),
        ("!project {dir: .., args: [1]}", "args of a !project must be a mapping"),
        ("!project {dir: [1]}", "dir of a !project must be text"),
        ("!project {dir: .., set: {mian.x: 1}}", "nothing is called 'mian'"),
        ("!function {params: [], result: !project {dir: ..}}", "!project inside a !function"),
        ("!code {inputs: []}", "!code needs one target"),
        ("!code {target: nix}", "has no target 'nix'"),
        ("!code {target: tool, inputs: [toool]}", "has no target 'toool' that could be given"),
        ("!code {target: tool, inptus: []}", "unknown key 'inptus' of !code"),
        ("!code {target: tool, freeze: [x]}", "freeze: no parameter 'x'"),
        ("!code tool", "!code takes a mapping"),
    ],
)
def test_nodes_that_are_refused(refused: Refused, text: str, said: str):
    found = refused(f"tool: !singleton:dict\nlist: {{main: {text} }}", {"configs/parts.py": ""})
    assert said in found
    assert "configs/main.yaml:2:" in found or "no parameter" in found or "project" in found or "mian" in found


def test_problems_of_a_load_are_told_at_once_and_each_once(refused: Refused):
    said = refused(
        "a: !ref nix\nb: [!ref a , !ref a , '${nux}']\nc: !singleton:dict {x: !ref b , y: !nope 1}".replace(
            "!nope ", ""
        )
    )
    assert said.count("nothing is called 'nix'") == 1
    assert said.count("nothing is called 'nux'") == 1
    assert said.startswith("2 problems in the configuration")


def test_an_exception_in_a_constructor_keeps_its_type_and_gets_one_note(load: Load):
    project = load(
        "main: !singleton:dict\n  f: !function\n    params: [x]\n    result: !singleton:int [!ref x ]\n"
        "other: [!singleton:dict [1] ]"
    )
    function = project.build("main")["f"]
    with pytest.raises(ValueError, match="invalid literal") as caught:
        function("nonsense")
    assert caught.value.__notes__ == ["while building main.f.result: int (configs/main.yaml:4:13)"]
    with pytest.raises(TypeError, match="not iterable") as other:
        project.build("other")
    assert other.value.__notes__ == ["while building other[0]: dict (configs/main.yaml:5:9)"]


def test_a_function_refuses_arguments_as_python_does(load: Load):
    function = load("main: !function {params: [a, b], result: ['${a}', '${b}']}").build("main")
    assert function(1, b=2) == function(a=1, b=2) == [1, 2]
    for positional, keywords in (((1,), {}), ((1, 2, 3), {}), ((1, 2), {"a": 1}), ((1, 2), {"c": 1})):
        with pytest.raises(TypeError):
            function(*positional, **keywords)


def test_a_python_file_is_one_module_whoever_names_it(load: Load):
    project = load(
        "a: !symbol:../parts.py:Part\nb: !singleton:../configs/../parts.py:Part\nmain: [!ref a , !ref b ]",
        {"parts.py": "class Part:\n    pass\n"},
    )
    kind, part = project.build("main")
    assert type(part) is kind
    assert type(pickle.loads(pickle.dumps(part))) is kind
    names: dict[str, Any] = {}
    exec(project.code("main"), names)
    assert names["construct"]()[0] is kind


OTHER = f"""
args: {{n: 1}}
tool: !singleton:{R}:Thing ["${{n}}"]
main: [!ref tool , "${{n}}"]
"""


def test_equal_projects_are_one_instance_and_others_are_not(load: Load):
    project = load(
        """
        _a: !project {dir: ../other, args: {n: 1}}
        _b: !project {dir: ../other, args: {n: "${1}"}, config: main}
        _c: !project {dir: ../other, args: {n: 2}}
        _d: !project {dir: ../other}
        mine: !singleton:dict
        _e: !project {dir: ../other, with: {tool: !ref mine }}
        _f: !project {dir: ../other, with: {tool: !ref alias }}
        alias: !ref mine
        main: [!ref _a.tool , !ref _b.tool , !ref _c.tool , !ref _d.tool ]
        given: [!ref _e.main , !ref _f.main , !ref mine ]
        """,
        {"other/project.yaml": "", "other/configs/main.yaml": OTHER},
    )
    a, b, c, d = project.build("main")
    assert a is b
    assert len({id(a), id(c), id(d)}) == 3
    e, f, mine = project.build("given")
    assert e[0] is f[0] is mine
    assert e[1] == 1


def test_overrides_reach_into_projects(load: Load, refused: Refused):
    files = {"other/project.yaml": "", "other/configs/main.yaml": OTHER + "deep: {a: {b: 1}}\n"}
    text = "p: !project {dir: ../other}\nmain: ['${p.n}', !ref p.deep ]"
    words = ["p.args.n=7", "p.set.deep.a.b=[2]", "p.set.deep=!append {c: 3}"]
    assert load(text, files, words=words).build("main") == [7, {"a": {"b": [2]}, "c": 3}]
    assert "has no 'n'" in refused(text, files, words=["p.n=1"])
    assert "p.set.n=VALUE" in refused(text, files, words=["p.n=1"])
    assert "nothing is called 'x' in 'deep'" in refused(text, files, words=["p.set.deep.x=1"])
    assert "has no parameter 'm'" in refused(text, files, words=["p.args.m=1"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("main", "must be key.path=value"),
        ("mian.x=1", "nothing is called 'mian'\n  fix: did you mean 'main'?"),
        ("main.plain.x=1", "known here: y; an override changes what is there: to add x, write it in a config"),
        ("unheard=1", "known here: alias, main, xs;"),
        ("main.plain.x=1", "nothing is called 'x' in 'main.plain'"),
        ("xs[5]=1", "'xs' has no item 5"),
        ("xs.a=1", "'xs' has no part 'a': it is a list"),
        ("alias.x=1", "'alias' has no part 'x': it is !ref main"),
        ("main..x=1", "is no path"),
        ("main.x={a: ", "YAML"),
        ("main.x=yes", "unquoted 'yes'"),
        ("main.nothing=!delete", "!delete of 'main.nothing'"),
        ("args.x=1", "nothing is called 'args'"),
        ("args.n=1", "'n' is a parameter, and words override targets\n  fix: give it by --n VALUE"),
        ("n=1", "'n' is a parameter, and words override targets"),
    ],
)
def test_words_that_are_refused(refused: Refused, word: str, said: str):
    text = "args: {n: 1}\nmain: !singleton:dict {plain: {y: 1}}\nxs: [1]\nalias: !ref main\n_own: 1"
    found = refused(text, words=[word])
    assert said in found
    assert found.startswith(word)


def test_words_that_fit(load: Load):
    text = "main: !singleton:dict {plain: {y: 1}}\nxs: [1, 2, {a: 1}]\nempty: !singleton:dict"
    words = [
        "main.plain.y=2",
        "main.new.deep=3",
        "main.new.wide=4",
        "xs[-1].a=9",
        "xs[0]=!delete",
        "empty.x=1",
        "main.plain=!append {z: 3}",
    ]
    project = load(text, words=words)
    assert project.build("main") == {"plain": {"y": 2, "z": 3}, "new": {"deep": 3, "wide": 4}}
    assert project.build("xs") == [2, {"a": 9}]
    assert project.build("empty") == {"x": 1}


def test_set_takes_python_values_and_refuses_objects(load: Load):
    assert load("main: {a: 1, b: 2}", set={"main.a": "1e-3", "main.b": (1, 2)}).build("main") == {
        "a": "1e-3",
        "b": (1, 2),
    }
    with pytest.raises(Problems, match="give objects by given"):
        load("main: {a: 1}", set={"main.a": object()})
    with pytest.raises(Problems, match="a parameter is plain data"):
        load("args: {a: 1}", args={"a": object()})


def test_types_as_parameters_through_another_project(load: Load, tmp_path: Path):
    project = load(
        "args: {kind: a}\n_p: !project {dir: ../other, args: {kind: '${kind}'}}\nmain: !ref _p.main",
        {"other/project.yaml": "", "other/configs/m.yaml": "args: {kind: b}\n_k: {a: 1, b: 2}\nmain: !ref _k.${kind}"},
    )
    assert project.build("main") == 1
    assert project.replaced(args={"kind": "b"}).build("main") == 2


SET = "xs: [1]\nrules: {a: 1, b: 2}\nnode: !singleton:dict {x: 1}\nmain: [!ref xs , !ref rules , !ref node ]\n"


@pytest.mark.parametrize(
    ("parent", "child", "words", "main"),
    [
        ("xs: !append [2]", "{}", [], [[1, 2], {"a": 1, "b": 2}, {"x": 1}]),
        ("rules.a: !delete", "{}", [], [[1], {"b": 2}, {"x": 1}]),
        ("rules: !replace {c: 3}", "{}", [], [[1], {"c": 3}, {"x": 1}]),
        ("rules: {a: !delete , c: 3}", "{}", [], [[1], {"b": 2, "c": 3}, {"x": 1}]),
        ("node: !patch:collections:OrderedDict {y: 2}", "{}", [], [[1], {"a": 1, "b": 2}, {"x": 1, "y": 2}]),
        # one override over another
        ("xs: !append [2]", "{xs: !append [3]}", [], [[1, 2, 3], {"a": 1, "b": 2}, {"x": 1}]),
        ("xs: [2]", "{xs: !prepend [3]}", [], [[3, 2], {"a": 1, "b": 2}, {"x": 1}]),
        ("rules: {a: 5}", "{rules: {b: 6}}", [], [[1], {"a": 5, "b": 6}, {"x": 1}]),
        ("rules: !replace {c: 3}", "{rules: {d: 4}}", [], [[1], {"c": 3, "d": 4}, {"x": 1}]),
        ("rules: !delete", "{rules: {d: 4}}", [], [[1], {"d": 4}, {"x": 1}]),
        ("rules.a: !delete", "{rules.a: !delete }", [], [[1], {"a": 1, "b": 2}, {"x": 1}]),
        # words
        ("{}", "{}", ["p.set.xs=!append [2]", "p.set.rules.a=!delete"], [[1, 2], {"b": 2}, {"x": 1}]),
        ("{}", "{}", ["p.set={rules: !replace {c: 3}}"], [[1], {"c": 3}, {"x": 1}]),
    ],
)
def test_tags_below_set_are_the_other_projects(
    write: Callable[..., Path], parent: str, child: str, words: list[str], main: list[object]
):
    files = {"other/project.yaml": "default: main", "other/configs/main.yaml": SET}
    base = f"p: !project\n  dir: ../other\n  set:\n    {parent}\nmain: !ref p.main\n"
    write(files, base=base, main=f"extends: base.yaml\np: {{set: {child}}}\n")
    assert Project(".", words=words).build("main") == main


def test_overrides_of_a_set_that_say_two_things_are_refused(write: Callable[..., Path]):
    files = {"other/project.yaml": "default: main", "other/configs/main.yaml": SET}
    base = "p: !project {dir: ../other, set: {xs: !append [2]}}\nmain: !ref p.main\n"
    write(files, base=base, main="extends: base.yaml\np: {set: {xs: !prepend [3]}}\n")
    with pytest.raises(ConfigError, match=r"^configs/main.yaml:2:15: !prepend cannot join the override at"):
        Project(".")


def test_a_long_chain_of_references_is_an_error_not_a_traceback(refused: Refused):
    text = "a0: 1\n" + "".join(f"a{number}: !ref a{number - 1}\n" for number in range(1, 500))
    assert "the chain of references through this place is too long" in refused("main: !ref a499\n" + text)


INNER = """
    k: {a: 1, b: [2, 3]}
    early: ${k.a + k.b[1]}
    late: ${k.a + extra.imag}
    extra: !singleton:complex [0, 1]
    part: !ref k.b
    first: ${k["a"]}
    """


@pytest.mark.parametrize("given", ["{k: {a: 5, b: [6, 7]}}", "{k: !ref data }", "{k: !ref _p.k }", "{k: '${x}'}"])
def test_parts_of_data_that_is_given_are_read_as_of_data_that_is_written(load: Load, given: str):
    main = f"""
        args: {{x: {{type: yaml, default: {{a: 5, b: [6, 7]}}}}}}
        data: {{a: 5, b: [6, 7]}}
        _p: !project {{dir: ../other, set: {{k: {{a: 5, b: [6, 7]}}}}}}
        _o: !project {{dir: ../other, with: {given}}}
        main: [!ref _o.early , !ref _o.late , !ref _o.part , !ref _o.first ]
        """
    project = load(main, {"other/project.yaml": "default: main\n", "other/configs/main.yaml": INNER})
    made: dict[str, Any] = {}
    exec(project.code("main"), made)
    assert project.build("main") == made["construct"]() == [12, 6.0, [6, 7], 5]


def test_objects_among_given_data_keep_their_attributes(load: Load):
    main = """
        _o: !project {dir: ../other, with: {k: {a: !singleton:complex [5, 1], b: [1, 2]}}}
        main: [!ref _o.attribute , !ref _o.item ]
        wrong: !ref _o.wrong
        """
    inner = "k: null\nattribute: ${k.a.real}\nitem: ${k.b[-1]}\nwrong: ${k.bb}\n"
    project = load(main, {"other/project.yaml": "default: main\n", "other/configs/main.yaml": inner})
    made: dict[str, Any] = {}
    exec(project.code("main"), made)
    assert project.build("main") == made["construct"]() == [5.0, 2]
    with pytest.raises(
        ConfigError, match=r"'k', given at configs/main.yaml:2:40, has no 'bb'\n  fix: did you mean 'b'"
    ):
        project.build("wrong")


@pytest.mark.parametrize(
    ("item", "make"),
    [
        ("!singleton:dict {x: !ref t%s }", lambda project: project.build("main")),
        ("!singleton:dict {x: !ref t%s }", lambda project: project.code("main")),
        ("[!ref t%s ]", lambda project: project.build("main")),
        ("[!ref t%s ]", lambda project: project.code("main")),
        ("[!ref t%s ]", lambda project: project.graph()),
    ],
)
def test_a_graph_too_deep_for_python_is_told_with_a_place(load: Load, item: str, make: Callable[[Project], Any]):
    lines = ["t0: !singleton:dict", *(f"t{i}: {item % (i - 1)}" for i in range(1, 900)), "main: !ref t899"]
    project = load("\n".join(lines))
    project.check()  # resolves in written order, which no depth hinders
    with pytest.raises(ConfigError, match=r"configs/main.yaml:\d+:\d+: .* too (deep|long)"):
        make(project)


def test_the_recursion_of_a_constructor_is_its_own(load: Load):
    project = load("main: !singleton:part.py:forever", {"configs/part.py": "def forever():\n    return forever()\n"})
    with pytest.raises(RecursionError):
        project.build("main")
