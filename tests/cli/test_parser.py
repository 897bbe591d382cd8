"""A command line is sorted the same way wherever its words stand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather.cli.parser import CommandParser, UsageError, split, unknown

FLAGS = {"--lr": True, "--out": True, "-o": True, "--fresh": False, "-f": False, "--edit": False, "-e": False}
ALIASES = {"-o": "--out", "-f": "--fresh", "-e": "--edit"}


def line(*tokens, words=True):
    return split(tokens, FLAGS, ALIASES, words=words)


@pytest.mark.parametrize("text", ["3", "-3", "-1e-3", "", "-", "a b", "{x: [1, -2]}", "=", "--5"])
def test_a_flag_takes_any_value_when_joined(text):
    assert line(f"--lr={text}").flags == [("--lr", text)]


@pytest.mark.parametrize("text", ["3", "-3", "-1e-3", "", "-", "a=b"])
def test_a_flag_takes_the_next_word(text):
    assert line("--lr", text, "x").flags == [("--lr", text)]
    assert line("--lr", text, "x").positionals == ["x"]


def test_short_flags_join_and_cluster():
    assert line("-ofile").flags == [("--out", "file")]
    assert line("-o=file").flags == [("--out", "file")]
    assert line("-fe", "-feo", "x").flags == [
        ("--fresh", None),
        ("--edit", None),
        ("--fresh", None),
        ("--edit", None),
        ("--out", "x"),
    ]


def test_words_keep_their_order():
    tokens = ["main.steps=50", "x=", 'rules["a.b=c"]=1', "hooks.my-hook=!delete", "x=2"]
    assert line(*tokens).words == tokens


def test_words_are_positionals_where_no_config_is_read():
    assert line("runs/lr=3", words=False).positionals == ["runs/lr=3"]


def test_what_follows_two_dashes_is_left_alone():
    sorted_line = line("x", "--", "--lr", "a=b", "--")
    assert sorted_line.positionals == ["x"]
    assert sorted_line.rest == ["--lr", "a=b", "--"]
    assert line("x").rest is None


@pytest.mark.parametrize("tokens", [["--lr"], ["--lr", "--fresh"], ["--lr", "--"], ["--lr", "-f"], ["-o"]])
def test_a_missing_value_is_an_error(tokens):
    with pytest.raises(UsageError, match="needs a value"):
        line(*tokens)


def test_a_value_for_a_switch_is_an_error():
    with pytest.raises(UsageError, match="--fresh takes no value, and was given 'no'"):
        line("--fresh=no")


def test_no_flag_is_abbreviated():
    assert line("--fre").unknown == ["--fre"]
    assert line("--learning=3").unknown == ["--learning"]


pieces = st.sampled_from([("--lr", "1"), ("--fresh",), ("-o", "f"), ("a.b=1",), ("pos",), ("c=2",), ("--lr=-2",)])


@given(st.permutations([("--lr", "1"), ("--fresh",), ("-o", "f"), ("a.b=1",), ("pos",), ("c=2",)]))
def test_the_order_of_words_does_not_matter(order):
    ordered = line(*[token for piece in order for token in piece])
    assert sorted(ordered.flags, key=str) == sorted([("--lr", "1"), ("--fresh", None), ("--out", "f")], key=str)
    assert sorted(ordered.words) == ["a.b=1", "c=2"]
    assert ordered.positionals == ["pos"]


@given(st.lists(pieces))
def test_argparse_reads_back_what_was_split(parts):
    tokens = [token for piece in parts for token in piece if piece != ("pos",)]
    parser = CommandParser(prog="x")
    parser.add_argument("--lr")
    parser.add_argument("-o", "--out")
    parser.add_argument("--fresh", action="store_true")
    read = parser.parse_args(line(*tokens).arguments())
    assert read.fresh == ("--fresh" in tokens)
    assert read.out == ("f" if "-o" in tokens else None)


def test_the_nearest_name_is_shown():
    assert unknown("flag", "--hiden-size", ["--hidden-size", "--lr"]).fix == "did you mean --hidden-size?"
    assert unknown("verb", "zzz", ["construct", "test"]).fix == "one of: construct, test"


def test_flags_that_take_lists_are_refused_when_declared():
    parser = CommandParser(prog="x")
    parser.add_argument("--names", nargs="*")
    with pytest.raises(AssertionError, match="append"):
        parser.flags()
