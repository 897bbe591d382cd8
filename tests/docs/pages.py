"""Reads the pages of the documentation: fenced blocks, links, and the commands and paths that they name.

A fence whose language is followed by `run` is executed by the tests:

    ```bash run
    forgather -p configs/tiny_llama targets
    ```

The blocks of a page run in order in one folder of their own that holds a copy of `configs/`, with `forgather` on the
path; those of one language that follow one another are one program. What is heavy stands in a plain `bash` block: its
commands are parsed, flags and config included, not run. Any `python` block must compile, any `yaml` block be readable.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITTEN_BY_RUNS = {"output_models", "runs", "prepared", "__pycache__"}
_TOP_FOLDERS = ("forgather", "configs", "tests", "docs", "benchmarks", "launch")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, whether it is to be run, its text, and the line where the text begins."""

    language: str
    is_run: bool
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    """One page, named as in the repository."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self) -> Iterator[Block]:
        opened: tuple[str, str, int] | None = None
        lines: list[str] = []
        for number, line in enumerate(self.text.splitlines(), start=1):
            fence = re.match(r"^\s*(```+)(.*)$", line)
            if opened is None and fence:
                opened, lines = (fence[1], fence[2].strip(), number), []
            elif opened is not None and fence and fence[1] == opened[0] and not fence[2].strip():
                language, *words = opened[1].split() or [""]
                yield Block(language, "run" in words, textwrap.dedent("\n".join(lines) + "\n"), opened[2] + 1)
                opened = None
            elif opened is not None:
                lines.append(line)
        assert opened is None, f"{self}:{opened[2]}: this fence is never closed"

    def programs(self) -> Iterator[Block]:
        """What to run, in order: blocks of one language that follow one another are one program."""
        marked = [block for block in self.blocks() if block.is_run]
        for language, blocks in groupby(marked, key=lambda block: block.language):
            first, *others = blocks
            yield Block(language, True, "\n".join([first.text, *(block.text for block in others)]), first.line)

    def indented_commands(self) -> str:
        """The lines of indented code that begin with a command of ours, as one shell text."""
        command = re.compile(r"^ {4,}((?:\w+=\S+ +)*(?:\S*forgather|torchrun|make|\S*python\d?) .*)$", re.MULTILINE)
        return "\n".join(match[1] for match in command.finditer(self.prose()))

    def prose(self) -> str:
        """The page without its fenced blocks."""
        return re.sub(r"^\s*(```+)[^\n]*\n.*?^\s*\1\s*$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    def links(self) -> Iterator[str]:
        """Targets of links that stay in the repository, `path`, `path#heading` or `#heading`."""
        for target in re.findall(r"\]\(([^)\s]+)\)", self.prose()):
            if not re.match(r"[a-z]+:", target):
                yield target

    def named_paths(self) -> Iterator[str]:
        """Paths of this repository that the prose names in code marks, without those that hold a placeholder."""
        for code in re.findall(r"`([^`\n]+)`", self.prose()):
            top, slash, _ = code.partition("/")
            if slash and top in _TOP_FOLDERS and re.fullmatch(r"[\w./-]+", code):
                yield code

    def inline_commands(self) -> Iterator[str]:
        """What the prose calls a command: `forgather train`, say."""
        yield from re.findall(r"`(forgather [^`\n]+)`", self.prose())

    def anchors(self) -> set[str]:
        """The anchors of the page's headings, as GitHub makes them."""
        headings = re.findall(r"^#+\s+(.*?)\s*$", self.prose(), flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def all_pages() -> list[Page]:
    """The pages at the top, every page below docs/, and those that stand beside what they are about."""
    found = sorted(ROOT.glob("*.md"))
    for folder in ("docs", "launch", "benchmarks", "configs"):
        found += sorted(ROOT.joinpath(folder).rglob("*.md"))
    return [Page(path) for path in found if not WRITTEN_BY_RUNS & set(path.relative_to(ROOT).parts)]


def shell_commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell text, word by word, without assignments before them and redirections."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        words = iter(lexer)
        for word in words:
            if set(word) <= set("();&|"):
                yield from [command] if command else []
                command = []
            elif set(word) <= set("<>&|"):  # a redirection: with it go its file and the descriptor's number
                next(words, None)
                if command and command[-1].isdecimal():
                    command.pop()
            elif command or not re.match(r"[A-Za-z_]\w*=", word):
                command.append(word)
        yield from [command] if command else []


def forgather_arguments(command: list[str]) -> list[str] | None:
    """The words after `forgather` in `forgather ...`, `python -m forgather ...` and `torchrun ... -m forgather ...`."""
    if Path(command[0]).name == "forgather":
        return command[1:]
    for place in range(len(command) - 1):
        if command[place : place + 2] == ["-m", "forgather"]:
            return command[place + 2 :]
    return None
