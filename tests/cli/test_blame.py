"""A value that a constructor refuses is the user's to mend; what breaks inside of Forgather is not."""

import pytest

from forgather.cli.main import main
from forgather.config import blame

NUMBER = "number: !singleton:int [x]\n"
OWN = "part: !singleton:part.py:Part {size: 0}\n"
PART = "class Part:\n    def __init__(self, size):\n        1 / size\n"


@pytest.fixture
def config(project):
    """Writes a config of the project."""

    def write(text: str) -> None:
        (project / "configs" / "own.yaml").write_text(text)
        (project / "configs" / "part.py").write_text(PART)

    return write


def test_a_value_that_a_constructor_refuses_is_told_in_short(config, forgather):
    config(NUMBER)
    done = forgather("-t", "own", "construct", "number")
    assert done.code == 2
    assert done.err == (
        "error: ValueError: invalid literal for int() with base 10: 'x'\n"
        "  while building number: int (configs/own.yaml:1:9)\n"
        "  fix: change what is given there; with FORGATHER_TRACEBACK=1 the traceback is shown\n"
    )


@pytest.mark.parametrize("word", ["both.base=nope", "base=nope"])
def test_the_word_that_gave_the_value_is_named(config, forgather, word):
    config("base: 10\nboth: !singleton:int {'*': ['7'], base: !ref base }\n")
    done = forgather("-t", "own", "construct", "both", word)
    assert done.code == 2
    assert f", given {word}\n" in done.err


def test_a_library_that_refuses_a_value_is_told_in_short(config, forgather):
    config("number: !singleton:fractions:Fraction [a/b]\n")
    done = forgather("-t", "own", "construct", "number")
    assert done.code == 2
    assert done.err.startswith("error: ValueError: Invalid literal for Fraction: 'a/b'\n  while building number: ")
    assert "Traceback" not in done.err


def test_the_traceback_is_shown_on_demand(config, forgather, monkeypatch):
    monkeypatch.setenv("FORGATHER_TRACEBACK", "1")
    config(NUMBER)
    done = forgather("-t", "own", "construct", "number")
    assert done.code == 2
    assert "\nTraceback (most recent call last):\n" in done.err


def test_code_of_ones_own_is_told_with_its_traceback(config, forgather):
    config(OWN)
    done = forgather("-t", "own", "construct", "part")
    assert done.code == 2
    assert done.err.startswith("error: ZeroDivisionError: division by zero\n  while building part: part.py:Part (")
    assert 'part.py", line 3, in __init__\n' in done.err


def test_our_constructor_that_refuses_a_value_is_the_users(config, forgather, monkeypatch):
    monkeypatch.setattr(blame, "_is_ours", lambda code: code.co_filename.endswith("part.py"))
    config(OWN.replace("0", "x"))
    done = forgather("-t", "own", "construct", "part")
    assert done.code == 2
    assert done.err.startswith("error: TypeError: unsupported operand type(s)")
    assert "Traceback" not in done.err


def test_what_breaks_inside_of_ours_escapes(config, forgather, monkeypatch):
    monkeypatch.setattr(blame, "_is_ours", lambda code: code.co_filename.endswith("part.py"))
    config(OWN)
    with pytest.raises(ZeroDivisionError):
        main(["-t", "own", "construct", "part"])
