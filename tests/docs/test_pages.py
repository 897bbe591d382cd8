"""What the documentation shows is true: its blocks run, its commands parse, its links and paths exist."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forgather.cli.commands import COMMANDS
from forgather.cli.main import _place_of_command
from forgather.cli.options import read_options
from forgather.config.read import read
from tests.docs.pages import ROOT, WRITTEN_BY_RUNS, Page, all_pages, forgather_arguments, shell_commands

PAGES = all_pages()
PROGRAM_LIMIT_S = 240
# Its blocks show errors as well as configs, and tests/config holds each to what the page says of it.
HELD_ELSEWHERE = "docs/reference/config-language.md"
# What these pages run takes 7 to 50 s each, most of it imports: every command of theirs is a process. What they show
# has tests of its own; `make soak` runs the pages themselves.
HEAVY = {
    "configs/tiny_experiments/README.md",
    "docs/guides/debugging.md",
    "docs/guides/own_text.md",
    "docs/reference/command-line.md",
    "docs/reference/data.md",
    "docs/reference/import-export.md",
    "docs/reference/meshes.md",
    "docs/reference/metrics.md",
    "docs/reference/model-cli.md",
    "docs/reference/model-initialisation.md",
    "docs/reference/parity.md",
    "docs/reference/parts.md",
    "docs/reference/vocabulary.md",
    "docs/reference/weights.md",
    "docs/tutorials/first_run.md",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory like the top of the repository, without what runs have written there."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns(*WRITTEN_BY_RUNS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_block(language: str, text: str, folder: Path) -> None:
    program = {"bash": ["bash", "-euo", "pipefail", "-c", text], "python": [sys.executable, "-c", text]}[language]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        program, cwd=folder, env=environment, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S, check=False
    )
    assert done.returncode == 0, f"{text}\n--- exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def check_commands(text: str, place: str) -> None:
    """Each `forgather`, `make` and `python FILE` command of a shell text exists, with the flags that it is given."""
    for command in shell_commands(text):
        if any(word.startswith("[") for word in command):  # a synopsis
            continue
        arguments = forgather_arguments(command)
        if arguments is not None:
            check_forgather(arguments, f"{place}: {' '.join(command)}")
        elif command[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert {word for word in command[1:] if "=" not in word} <= set(targets), f"{place}: {' '.join(command)}"
        elif Path(command[0]).name.startswith("python") and command[1:] and command[1].endswith(".py"):
            assert (ROOT / command[1]).is_file(), f"{place}: {' '.join(command)}"


def check_forgather(arguments: list[str], place: str) -> None:
    number = _place_of_command(arguments)
    if number == len(arguments):  # `forgather --help`
        return
    name = arguments[number]
    assert name in COMMANDS, f"{place}: no command {name}"
    options = read_options(name, [*arguments[:number], *arguments[number + 1 :]], argv=arguments)
    if options is not None and options.command.NEEDS_CONFIG:
        assert options.project.digest


def all_but_held_elsewhere() -> list[object]:
    """The pages, those that take long for `make soak`."""
    pages = [page for page in PAGES if str(page) != HELD_ELSEWHERE]
    return [pytest.param(page, id=str(page), marks=[pytest.mark.soak] if str(page) in HEAVY else []) for page in pages]


@pytest.mark.parametrize("page", all_but_held_elsewhere())
def test_blocks_run_and_commands_parse(page: Page, folder: Path):
    for block in page.programs():
        run_block(block.language, block.text, folder)
    check_blocks(page)


# The commands of these are about projects that their own blocks make.
MAKING_PROJECTS = {"docs/guides/own_text.md", "docs/reference/command-line.md", "docs/tutorials/first_run.md"}


@pytest.mark.parametrize("name", sorted(HEAVY - MAKING_PROJECTS))
def test_commands_of_heavy_pages_parse(name: str, folder: Path):
    check_blocks(Page(ROOT / name))


def check_blocks(page: Page) -> None:
    """Every block is of its language, and every command exists."""
    for block in page.blocks():
        place = f"{page}:{block.line}"
        if block.language == "bash":
            check_commands(block.text, place)
        elif block.language == "python":
            compile(block.text, place, "exec")
        elif block.language == "yaml":
            read(block.text, place)
    check_commands(page.indented_commands(), str(page))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_resolve(page: Page):
    for link in page.links():
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), f"{page}: {link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in Page(target).anchors(), f"{page}: {link} is no heading of {target.name}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_the_prose_names_exists(page: Page):
    for path in page.named_paths():
        assert any((folder / path).exists() for folder in (ROOT, page.path.parent)), f"{page} names {path}"
    for command in page.inline_commands():
        words = command.split()[1:]
        number = _place_of_command(words)
        name = words[number] if number < len(words) else "COMMAND"
        assert name in COMMANDS or name.isupper(), f"{page} names `{command}`"  # in capitals: any command


def test_every_page_is_reached_from_the_index():
    reached, waiting = set(), [Page(ROOT / "docs" / "README.md")]
    while waiting:
        page = waiting.pop()
        if page.path in reached:
            continue
        reached.add(page.path)
        targets = [(page.path.parent / link.partition("#")[0]).resolve() for link in page.links()]
        waiting += [Page(target) for target in targets if target.suffix == ".md" and target.exists()]
    unreached = {page.path for page in PAGES if page.path != ROOT / "README.md"} - reached
    assert not unreached, f"no link leads to {sorted(str(path.relative_to(ROOT)) for path in unreached)}"
