"""The order of the files a config extends, and what of them is inherited."""

from collections.abc import Callable
from pathlib import Path
from time import process_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forgather import Project
from forgather.config.inherit import Loader
from forgather.config.problems import Problems
from forgather.errors import ConfigError

Write = Callable[..., Path]


def test_a_diamond_is_merged_once_each_base_first(write: Write):
    write(
        base="main: {list: [base], a: base, b: base}",
        left="extends: base.yaml\nmain: {list: !append [left], a: left}",
        right="extends: base.yaml\nmain: {list: !append [right], b: right}",
        main="extends: [left.yaml, right.yaml]\nmain: {list: !append [main]}",
    )
    # Were the base merged twice, it would undo what the left one said of a.
    assert Project(".").build("main") == {"list": ["base", "left", "right", "main"], "a": "left", "b": "right"}


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_order_is_pythons(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("order")
    classes: list[type] = []
    for number in range(data.draw(st.integers(1, 7))):
        parents = data.draw(st.lists(st.integers(0, number - 1), unique=True, max_size=3)) if number else []
        listed = ", ".join(f"f{each}.yaml" for each in parents)
        (folder / f"f{number}.yaml").write_text(f"extends: [{listed}]\n")
        file = folder / f"f{number}.yaml"
        try:
            # Python's earlier base wins, ours the later one.
            made = type(f"f{number}", tuple(classes[each] for each in reversed(parents)), {})
        except TypeError:
            with pytest.raises(Problems, match="no order of the files is consistent"):
                Loader().load(file, ())
            return
        classes.append(made)
        expected = [each.__name__ for each in reversed(made.__mro__[:-1])]
        assert [path.stem for path in Loader().load(file, ()).order] == expected


def test_extends_and_description_are_not_inherited(write: Write):
    write(base="description: The base\nmain: 1", main="extends: base.yaml")
    assert Project(".").description == ""
    assert Project(".", "base").description == "The base"


def test_circles_show_the_chain(write: Write):
    write(main="extends: a.yaml", a="extends: b.yaml", b="extends: a.yaml")
    with pytest.raises(ConfigError, match=r"configs/a.yaml -> configs/b.yaml -> configs/a.yaml"):
        Project(".")


def test_problems_of_all_files_are_told_together(write: Write):
    write(main="extends: [a.yaml, b.yaml]", a="x: on", b="x: 1_0")
    with pytest.raises(ConfigError) as caught:
        Project(".")
    assert "a.yaml:1:4" in str(caught.value)
    assert "b.yaml:1:4" in str(caught.value)


@pytest.mark.parametrize(
    ("main", "said"),
    [
        ("[1]", "configs/main.yaml:1:1: a config must be a mapping"),
        ("!singleton:dict {a: 1}", "a config must be a mapping"),
        ("extends: 5", "extends names files"),
        ("extends: [{a: 1}]", "extends names files"),
        ("extends: [base.yaml, base.yaml]", "is extended twice"),
        ("extends: base", "no file 'base'\n  fix: did you mean 'base.yaml'?"),
        ("extends: lib:tran/causal_lm.yaml", "no file 'lib:tran/causal_lm.yaml'"),
        ("a-b: 1", "the target 'a-b' is no identifier"),
        ("class: 1", "the target 'class' is a word of Python"),
        ("env: 1", "the target 'env' is a reserved name"),
        ("null: 1", "the target 'null' is a reserved name"),
        ("extend: base.yaml\na.b: 1", "the target 'a.b' is no identifier"),
        ("args: 1", "args must be a mapping of parameters"),
        ("description: [1]", "description must be text"),
    ],
)
def test_roots_that_are_refused(write: Write, main: str, said: str):
    write(main=main, base="x: 1")
    with pytest.raises(ConfigError) as caught:
        Project(".")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("main", "is_refused"),
    [
        ("optimiser: {a: 2}", True),
        ("optimizers: {a: 2}", True),
        ("optimiser: !replace {a: 2}", False),
        ("optimiser: !singleton:dict {a: 2}", True),
        ("optimiser: 3", True),
        ("optimiser: !append {a: 2}", True),
        ("optimiser: [1]", False),
        ("optimiser: 3\nlayer: !ref optimiser", False),
        ("optimiser: 3\nlayer: ${optimiser + 1}", False),
        ("optimiser: 3\nlayer: !code {target: optimiser}", False),
        ("_optimizer: {a: 2}", False),
        ("_layer: !singleton:dict", False),
        ("scheduler: {a: 2}", False),
        ("layer_3: {a: 2}", False),
    ],
)
def test_a_new_root_value_of_nearly_a_known_name(write: Write, main: str, is_refused: bool):
    write(main=f"extends: base.yaml\n{main}", base="optimizer: {a: 1}\nlayer_2: {a: 1}\n_layers: {a: 1}")
    if is_refused:
        with pytest.raises(ConfigError, match="did you mean 'optimizer'"):
            Project(".")
    else:
        Project(".")


@pytest.mark.parametrize(
    ("main", "is_refused"),
    [
        ("args: {stpes: 10}", True),
        ("args: {stpes: {type: int, default: 10}}", True),
        ("args: {stpes: 10, steps: 20}", False),
        ("args: {stpes: 10}\nmain: {steps: '${stpes}'}", False),
        ("args: {stpes: 10}\nmain: {steps: !ref stpes }", False),
        ("args: {stpes: 10, warmup: '${stpes - 1}'}", False),
        ("args: {warmup: 10}", False),
    ],
)
def test_a_new_parameter_of_nearly_a_known_name_that_nothing_reads(write: Write, main: str, is_refused: bool):
    write(main=f"extends: base.yaml\n{main}", base="args: {steps: 300}\nmain: {steps: '${steps}'}")
    if is_refused:
        with pytest.raises(ConfigError, match=r"configs/main.yaml:2:8: .* nearly 'steps'.*\n.*did you mean 'steps'"):
            Project(".")
    else:
        Project(".")


def test_the_files_that_demand_an_order_are_named(write: Write):
    write(
        a="x: 1",
        b="x: 2",
        c="extends: [a.yaml, b.yaml]",
        d="extends: [b.yaml, a.yaml]",
        main="extends: [c.yaml, d.yaml]",
    )
    said = (
        "configs/d.yaml puts configs/a.yaml over configs/b.yaml, and configs/c.yaml configs/b.yaml over configs/a.yaml"
    )
    with pytest.raises(ConfigError, match=said):
        Project(".")


def test_a_folder_is_no_parent(write: Write):
    write(main="extends: .")
    with pytest.raises(ConfigError, match=r"^configs/main.yaml:1:10: '.' is a folder"):
        Project(".")


def test_many_new_targets_are_compared_with_many_known_ones_in_no_time(write: Write):
    write(
        base="".join(f"target_number_{number}: {{a: 1}}\n" for number in range(300)),
        main="extends: base.yaml\n" + "".join(f"quite_another_{number}: {{a: 1}}\n" for number in range(300)),
    )
    start = process_time()
    Project(".")
    # Counting all the edits of all the pairs takes more than ten seconds.
    assert process_time() - start < 2
