"""Each behaviour case is shown by a test that carries its number, or said not to apply."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "behaviour-cases.md"


def marked_cases() -> Iterator[int]:
    """The numbers of every `pytest.mark.case(...)` in the tests."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.case":
                yield from (ast.literal_eval(argument) for argument in node.args)


def listed_cases(heading: str) -> list[int]:
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [int(number) for number in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]


def test_every_case_is_listed_once() -> None:
    assert sorted(listed_cases("Shown by tests") + listed_cases("Not applicable")) == list(range(1, 61))


def test_what_is_said_to_be_shown_is_marked() -> None:
    assert sorted(set(marked_cases())) == listed_cases("Shown by tests")
