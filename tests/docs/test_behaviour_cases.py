"""Each behaviour case is shown by a test that carries its number, or said not to apply."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The page, the mark of its tests, and the cases that there are.
PAGES = [
    ("behaviour-cases.md", "case", [*range(1, 61)]),
    ("training-cases.md", "training_case", [*range(1, 50), *range(66, 87)]),
]
each_page = pytest.mark.parametrize(("page", "mark", "cases"), PAGES, ids=[page for page, *_ in PAGES])


def marked_cases(mark: str) -> Iterator[int]:
    """The numbers of every `pytest.mark.MARK(...)` in the tests."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"pytest.mark.{mark}":
                yield from (ast.literal_eval(argument) for argument in node.args)


def listed_cases(page: str, heading: str) -> list[int]:
    text = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [int(number) for number in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]


@each_page
def test_every_case_is_listed_once(page: str, mark: str, cases: list[int]) -> None:
    assert sorted(listed_cases(page, "Shown by tests") + listed_cases(page, "Not applicable")) == cases


@each_page
def test_what_is_said_to_be_shown_is_marked(page: str, mark: str, cases: list[int]) -> None:
    assert sorted(set(marked_cases(mark))) == listed_cases(page, "Shown by tests")
