"""Strict reading: places, scalars of the core schema, and every refusal with its place and what to write."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather.config.parameters import plain_data
from forgather.config.problems import Problems
from forgather.config.read import read, read_file, read_word
from forgather.config.scalars import AmbiguousScalarError, read_plain
from forgather.config.show import scalar_text
from forgather.config.tree import MappingValue, Tag


def problems(text: str) -> list[str]:
    with pytest.raises(Problems) as caught:
        read(text, "/f.yaml")
    return [str(each) for each in caught.value.problems]


def test_every_key_and_value_knows_its_place():
    root = read("a: 1\nb:\n  - !ref c\n  - {d: [x]}\n", "/f.yaml")
    assert isinstance(root, MappingValue)
    assert [str(key.place) for key in root] == ["/f.yaml:1:1", "/f.yaml:2:1"]
    items = root.items[root.key("b")].items  # type: ignore[attr-defined]
    assert str(items[0].place) == "/f.yaml:3:5"
    assert items[0].tag == Tag("ref")
    assert str(items[1].items[items[1].key("d")].items[0].place) == "/f.yaml:4:10"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e4", 1e4),
        ("010", 10),
        ("0o10", 8),
        ("0xff", 255),
        ("-3", -3),
        ("+3", 3),
        (".5", 0.5),
        ("5.", 5.0),
        ("TRUE", True),
        ("False", False),
        ("~", None),
        ("Null", None),
        ("-.inf", -math.inf),
        ("1.2.3", "1.2.3"),
        ("yesterday", "yesterday"),
        ("-x", "-x"),
        ("=", "="),
        ("2024-01", "2024-01"),
        ("1e", "1e"),
        ("0b2", "0b2"),
        ("a_1", "a_1"),
        ("4_layers", "4_layers"),
    ],
)
def test_core_schema(text: str, value: object):
    assert read_plain(text) == value
    assert type(read_plain(text)) is type(value)


def test_nan():
    assert math.isnan(read_plain(".nan"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["yes", "No", "ON", "off", "y", "N", "1_000", "0x_ff", "1_0.5", "12:30", "1:2:3", "2024-1-2", "0b11", "-0xff"],
)
def test_what_yaml_1_1_reads_differently_is_refused_unless_quoted(text: str):
    with pytest.raises(AmbiguousScalarError) as caught:
        read_plain(text)
    assert "write" in caught.value.fix
    root = read(f"a: '{text}'\nb: \"{text}\"\n", "f")
    assert plain_data(root) == {"a": text, "b": text}  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1e400", "-1e400", "9" * 5000])
def test_a_number_beyond_the_largest_float_is_refused(text: str):
    with pytest.raises(AmbiguousScalarError, match="beyond the largest float"):
        read_plain(text)


def test_keys_are_text():
    assert plain_data(read("y: 1\n1: 2\nnull: 3\n", "f")) == {"y": 1, "1": 2, "null": 3}  # type: ignore[arg-type]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
        lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text("abc: #-", max_size=5), below, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_what_show_writes_reads_back(value: object):
    def flow(item: object) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{quoted(key)}: {flow(each)}" for key, each in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(flow(each) for each in item) + "]"
        text = scalar_text(item)  # type: ignore[arg-type]
        return (
            quoted(text) if isinstance(item, str) and any(mark in text for mark in "[]{},") and text == item else text
        )

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "''") + "'"

    assert plain_data(read(f"a: {flow(value)}\n", "f")) == {"a": value}  # type: ignore[arg-type]


def test_empty_files_hold_nothing():
    assert read("", "f") is None
    assert read("# only a comment\n", "f") is None


def test_problems_of_a_file_are_told_together():
    found = problems("a: yes\na: 1\nb: &x 1\nc: *x\n<<: {}\nd: !unknown 1\ne: !!int 3\nf: !singleton\n? [k]\n: 1\n")
    assert [each.split(":")[1] for each in found] == ["1", "2", "3", "4", "5", "6", "7", "8", "9"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: ${x}\nb: {c: ${x}}", "/f.yaml:2:8: an unquoted ${...} inside {...} or [...]"),
        ("b: [1, pre${x}]", "/f.yaml:1:8: an unquoted ${...}"),
        ("a: [!ref]", "/f.yaml:1:5: the tag !ref stands right before ']'"),
        ("a: {b: !symbol:torch:bfloat16}", "/f.yaml:1:8: the tag !symbol:torch:bfloat16 stands right before '}'"),
        ("a: 1\n\tb: 2", "indent with blanks"),
        ("a: b: c", "quote text that holds ': '"),
        ("a: ${x if y: z}", "quote a value that holds ${...}"),
        ("a: @b", "quote text that begins with"),
        ("a: [1", "/f.yaml:"),
        ("a: \x01", "/f.yaml:1:4: YAML"),
        ("a: 1\n---\nb: 1", "/f.yaml:2:1: a second document"),
        ("a: !ref:x y", "!ref takes nothing after a colon"),
        ("a: !dlete", "did you mean 'delete'?"),
        ("[" * 200, "levels of nesting"),
    ],
)
def test_refusals(text: str, expected: str):
    assert expected in "\n".join(problems(text))


def test_a_file_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "f.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(Problems, match=r"f.yaml:2:4: this byte is not UTF-8"):
        read_file(tmp_path / "f.yaml")
    with pytest.raises(Problems, match="cannot read"):
        read_file(tmp_path / "absent.yaml")


def test_a_quote_that_does_not_end_is_told_where_it_begins():
    with pytest.raises(Problems, match=r"^f:2:4: YAML: a quoted text that does not end\n  fix: close the quote"):
        read("a: 1\nb: 'text\nc: 2\n", "f")
    with pytest.raises(Problems) as caught:
        read("a: {b: 1\n", "f")
    assert "quote text that begins" not in str(caught.value)


def test_a_word_that_is_no_text():
    with pytest.raises(Problems, match="this is not UTF-8"):
        read_word("\udcff", "a=\udcff")
