"""Merging: every row of the table, and laws that hold for generated trees."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather.config.merge import merge
from forgather.config.override import apply_override
from forgather.config.paths import format_path, parse_path
from forgather.config.problems import Collector
from forgather.config.read import read
from forgather.config.tree import ListValue, MappingValue, Place, Scalar, Value, located


def tree(value: Value | None) -> Any:
    """A tree as nested Python data; a tag shows as a pair."""
    if value is None:
        return "nothing"
    inside: Any
    if isinstance(value, MappingValue):
        inside = {str(key): tree(item) for key, item in value.items.items()}
    elif isinstance(value, ListValue):
        inside = [tree(item) for item in value.items]
    else:
        assert isinstance(value, Scalar)
        inside = value.content
    return (str(value.tag), inside) if value.tag else inside


def merged(base: str, over: str) -> tuple[Any, list[str]]:
    problems = Collector()
    below = merge(None, read(base, "base") or Scalar(None, Place("x")), (), Collector())
    result = merge(below, read(over, "over") or Scalar(None, Place("x")), (), problems)
    return tree(result), [each.message for each in problems.found]


@pytest.mark.parametrize(
    ("base", "over", "result"),
    [
        # mapping without tag, over a mapping or a node's arguments
        ("{a: {x: 1, y: 2}}", "{a: {y: 3, z: 4}}", {"a": {"x": 1, "y": 3, "z": 4}}),
        ("{a: !singleton:f {x: 1}}", "{a: {y: 2}}", {"a": ("!singleton:f", {"x": 1, "y": 2})}),
        ("{a: !factory:f }", "{a: {y: 2}}", {"a": ("!factory:f", {"y": 2})}),
        ("{a: !partial:f [1]}", "{a: {y: 2}}", {"a": ("!partial:f", {"*": [1], "y": 2})}),
        ("{a: !project {dir: d}}", "{a: {config: c}}", {"a": ("!project", {"dir": "d", "config": "c"})}),
        (
            "{a: !function {params: [i], result: {x: 1}}}",
            "{a: {result: {y: 2}}}",
            {"a": ("!function", {"params": ["i"], "result": {"x": 1, "y": 2}})},
        ),
        ("{a: !values {x: 1}}", "{a: {y: null}}", {"a": ("!values", {"x": 1, "y": None})}),
        # mapping without tag, over null, nothing, a scalar, a list
        ("{a: null}", "{a: {x: 1}}", {"a": {"x": 1}}),
        ("{}", "{a: {x: 1}}", {"a": {"x": 1}}),
        ("{a: 3}", "{a: {x: 1}}", {"a": {"x": 1}}),
        ("{a: [3]}", "{a: {x: 1}}", {"a": {"x": 1}}),
        # joined mappings hold merge tags of their own; a node without arguments is an empty one
        ("{a: {x: 1, y: 2}}", "{a: !append {x: !delete , z: 3}}", {"a": {"y": 2, "z": 3}}),
        (
            "{a: {x: !factory:f {p: 1}, y: 2}}",
            "{a: !append {x: !patch:g {q: 2}}}",
            {"a": {"y": 2, "x": ("!factory:g", {"p": 1, "q": 2})}},
        ),
        ("{a: !factory:f }", "{a: !append [1]}", {"a": ("!factory:f", [1])}),
        ("{a: !factory:f }", "{a: !prepend {x: 1}}", {"a": ("!factory:f", {"x": 1})}),
        # anything with a tag, a scalar, a list: replaced
        ("{a: {x: 1}}", "{a: !singleton:f {y: 1}}", {"a": ("!singleton:f", {"y": 1})}),
        ("{a: !singleton:f {x: 1}}", "{a: !singleton:f {y: 1}}", {"a": ("!singleton:f", {"y": 1})}),
        ("{a: {x: 1}}", "{a: null}", {"a": None}),
        ("{a: {x: 1}}", "{a: 5}", {"a": 5}),
        ("{a: [1, 2]}", "{a: [3]}", {"a": [3]}),
        ("{a: {x: 1}}", "{a: !ref b}", {"a": ("!ref", "b")}),
        # !patch
        ("{a: !factory:f {x: 1}}", "{a: !patch:g {y: 2}}", {"a": ("!factory:g", {"x": 1, "y": 2})}),
        ("{a: !singleton:f {x: 1}}", "{a: !patch:g }", {"a": ("!singleton:g", {"x": 1})}),
        ("{a: !singleton:f {x: 1}}", "{a: !patch:g {x: !delete }}", {"a": ("!singleton:g", {})}),
        # !replace
        ("{a: {x: 1}}", "{a: !replace {y: 2}}", {"a": {"y": 2}}),
        ("{a: !singleton:f {x: 1}}", "{a: !replace {y: 2}}", {"a": {"y": 2}}),
        ("{}", "{a: !replace {y: 2}}", {"a": {"y": 2}}),
        # !delete
        ("{a: 1, b: 2}", "{a: !delete }", {"b": 2}),
        ("{a: {x: 1, y: 2}}", "{a: {x: !delete }}", {"a": {"y": 2}}),
        # !append and !prepend
        ("{a: [1]}", "{a: !append [2]}", {"a": [1, 2]}),
        ("{a: [1]}", "{a: !prepend [2]}", {"a": [2, 1]}),
        ("{a: null}", "{a: !append [2]}", {"a": [2]}),
        ("{}", "{a: !prepend [2]}", {"a": [2]}),
        ("{a: {x: 1}}", "{a: !append {y: 2}}", {"a": {"x": 1, "y": 2}}),
        ("{a: {x: {p: 1}, y: 2}}", "{a: !append {x: {q: 1}}}", {"a": {"y": 2, "x": {"p": 1, "q": 1}}}),
        ("{a: !singleton:f [1]}", "{a: !append [2]}", {"a": ("!singleton:f", [1, 2])}),
        ("{a: !tuple [1]}", "{a: !prepend [2]}", {"a": ("!tuple", [2, 1])}),
        # order of the parent, new keys last
        ("{a: 1, b: 2}", "{c: 3, b: 4, a: 5}", {"a": 5, "b": 4, "c": 3}),
    ],
)
def test_the_table(base: str, over: str, result: Any):
    made, said = merged(base, over)
    assert said == []
    assert made == result
    assert list(made) == list(result)
    assert [list(v) if isinstance(v, dict) else None for v in made.values()] == [
        list(v) if isinstance(v, dict) else None for v in result.values()
    ]


@pytest.mark.parametrize(
    ("base", "over", "said"),
    [
        ("{a: !ref b}", "{a: {x: 1}}", "'a' is !ref b"),
        ("{a: '${b}'}", "{a: {x: 1}}", "'a' is ${b}"),
        ("{a: 'x${b}'}", "{a: {x: 1}}", "'a' is x${b}"),
        ("{a: !symbol:b:C }", "{a: {x: 1}}", "'a' is !symbol:b:C"),
        ("{}", "{a: !delete }", "!delete of 'a', but nothing is there"),
        ("{a: {}}", "{a: {b: !delete }}", "!delete of 'a.b', but nothing is there"),
        ("{a: 1}", "{a: !delete 1}", "!delete takes no value"),
        ("{}", "{a: !patch:f {x: 1}}", "!patch of 'a', but nothing is there"),
        ("{a: {x: 1}}", "{a: !patch:f {x: 1}}", "!patch of 'a', but no node with arguments is there"),
        ("{a: {}}", "{a: !append [1]}", "!append cannot join a list to what stands at"),
        ("{a: [1]}", "{a: !prepend {x: 1}}", "!prepend cannot join a mapping to what stands at"),
        ("{a: 1}", "{a: !append 1}", "!append cannot join a scalar"),
        ("{a: 1}", "{a: !replace [1]}", "!replace takes a mapping"),
        ("{}", "{a: [!delete ]}", "!delete of a list item"),
    ],
)
def test_what_cannot_be_merged(base: str, over: str, said: str):
    assert said in "\n".join(merged(base, over)[1])


def test_a_merged_value_keeps_the_place_of_who_wrote_it():
    base, over = read("{a: 1, b: 2}", "/base"), read("{b: 3}", "/over")
    assert base is not None
    assert over is not None
    made = merge(base, over, (), Collector())
    assert isinstance(made, MappingValue)
    assert [item.place.file for item in made.items.values()] == ["/base", "/over"]


SCALARS = st.integers(0, 9) | st.none() | st.sampled_from(["x", "y"])
KEYS = st.sampled_from(["a", "b", "c", "d.e"])
TREES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=2) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=10,
)
ROOTS = st.dictionaries(KEYS, TREES, max_size=4)
HYPOTHESIS = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def value(data: Any) -> Value:
    return located(data, Place("generated"))


def over(*layers: Any) -> Any:
    problems = Collector()
    made: Value | None = None
    for layer in layers:
        made = merge(made, layer if isinstance(layer, Value) else value(layer), (), problems)
    assert not problems.found, problems.found
    return tree(made)


def model(base: Any, child: Any) -> Any:
    """The merge of plain trees in three lines."""
    if not (isinstance(base, dict) and isinstance(child, dict)):
        return child
    return {
        key: model(base[key], child[key]) if key in base and key in child else {**base, **child}[key]
        for key in (*base, *(each for each in child if each not in base))
    }


@HYPOTHESIS
@given(ROOTS, ROOTS)
def test_plain_trees_merge_as_the_model_says_in_values_and_order(base: Any, child: Any):
    made, expected = over(base, child), model(base, child)
    assert repr(made) == repr(expected)  # a dict's repr shows its order


@HYPOTHESIS
@given(ROOTS)
def test_merging_twice_or_with_nothing_changes_nothing(base: Any):
    assert repr(over(base, base)) == repr(over(base)) == repr(over(base, {})) == repr(over({}, base)) == repr(base)


@HYPOTHESIS
@given(ROOTS, ROOTS, ROOTS)
def test_layers_can_be_merged_from_either_end_when_mappings_stay_mappings(a: Any, b: Any, c: Any):
    # Where a scalar comes between two mappings, the order of merging shows: the scalar ends what is below it.
    first = over(over(a, b), c)
    second = over(a, over(b, c))
    if first != second:
        assert _has_wall(a, b, c)


def _has_wall(a: Any, b: Any, c: Any) -> bool:
    if isinstance(a, dict) and isinstance(c, dict) and not isinstance(b, dict):
        return True
    if not all(isinstance(each, dict) for each in (a, b, c)):
        return False
    return any(_has_wall(a[key], b[key], c[key]) for key in a if key in b and key in c)


def paths(data: Any, done: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, item in items for path in ((*done, key), *paths(item, (*done, key)))]


def nested(path: tuple[str, ...], leaf: Any) -> Any:
    return leaf if not path else {path[0]: nested(path[1:], leaf)}


@HYPOTHESIS
@given(ROOTS, TREES, st.data())
def test_an_override_is_a_child_file_with_one_path(base: Any, leaf: Any, data: st.DataObject):
    known = [path for path in paths(base) if all(isinstance(key, str) for key in path)]
    if not known:
        return
    path = data.draw(st.sampled_from(known))
    problems = Collector()
    root = value(base)
    assert isinstance(root, MappingValue)
    made = apply_override(root, format_path(path), value(leaf), problems)
    assert problems.found == []
    assert repr(tree(made)) == repr(over(base, nested(path, leaf)))
    # Setting again changes nothing, and the tree it was made from is as before.
    assert repr(tree(apply_override(made, format_path(path), value(leaf), problems))) == repr(tree(made))
    assert repr(tree(root)) == repr(base)


@HYPOTHESIS
@given(ROOTS, st.data())
def test_delete_then_write_moves_to_the_end_and_append_is_concatenation(base: Any, data: st.DataObject):
    for key, item in base.items():
        deleted = over(base, read(f'{{"{key}": !delete }}', "f"))
        assert key not in deleted
        assert repr(over(deleted, {key: item})) == repr({**{k: v for k, v in base.items() if k != key}, key: item})
        if isinstance(item, list):
            more = data.draw(st.lists(SCALARS, max_size=3))
            tagged = value({key: more})
            assert isinstance(tagged, MappingValue)
            for tag, expected in (("append", [*item, *more]), ("prepend", [*more, *item])):
                joined = read(f'{{"{key}": !{tag} {str(more).replace("None", "null")}}}', "f")
                assert over(base, joined)[key] == expected


@HYPOTHESIS
@given(st.lists(st.text("ab.[]\"'\\ 0_$é", min_size=1, max_size=4) | st.integers(-3, 3), min_size=1, max_size=4))
def test_a_path_that_is_written_reads_back(keys: list[Any]):
    keys = [str(keys[0]), *keys[1:]]
    assert [step.key for step in parse_path(format_path(keys))] == keys
