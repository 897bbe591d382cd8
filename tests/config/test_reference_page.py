"""Runs every example of docs/reference/config-language.md, in a fresh folder for each section.

A YAML block whose info string names a file is that file: `main.yaml` in the folder `configs`, `./x` beside it. A Python
block without a file runs in the folder. An `error` block holds lines that must all stand in the error of checking the
config written last; words behind `error` are overrides for it.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from forgather import Project
from forgather.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs/reference/config-language.md"


class Block(NamedTuple):
    language: str
    words: list[str]
    text: str
    line: int


def sections() -> Iterator[tuple[str, list[Block]]]:
    text = PAGE.read_text()
    heading, blocks = "", []
    pattern = re.compile(r"^(#{2,3} [^\n]*)$|^```(\w+) ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for match in pattern.finditer(text):
        if match[1]:
            yield heading, blocks
            heading, blocks = match[1].strip("# "), []
        else:
            line = text.count("\n", 0, match.start()) + 2
            blocks.append(Block(match[2], match[3].split(), match[4], line))
    yield heading, blocks


SECTIONS = [(heading, blocks) for heading, blocks in sections() if blocks]


def test_no_example_is_left_out():
    text = PAGE.read_text()
    assert sum(len(blocks) for _, blocks in SECTIONS) == len(re.findall(r"^```\w+", text, re.MULTILINE)) > 60


@pytest.mark.parametrize(("heading", "blocks"), SECTIONS, ids=[heading for heading, _ in SECTIONS])
def test_section(heading: str, blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project.yaml").write_text("default: main\n")
    names: dict[str, object] = {"Project": Project}
    for block in blocks:
        file = block.words[0] if block.words and block.language != "error" else None
        if file is not None:
            path = tmp_path / (file if file.startswith("./") else f"configs/{file}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(PAGE), "exec"), names)
        else:
            assert block.language == "error", f"{PAGE}:{block.line}: a block of no known kind"
            with pytest.raises(ConfigError) as caught:
                Project(tmp_path, words=block.words).check()
            missing = [line for line in block.text.splitlines() if line not in textwrap.dedent(str(caught.value))]
            assert not missing, f"{PAGE}:{block.line}: expected {missing} in\n{caught.value}"
