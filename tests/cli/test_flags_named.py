"""A remedy that names a flag names one that there is, in the form in which it is taken."""

import re
from pathlib import Path

from forgather import Project
from forgather.cli.commands import load
from forgather.cli.declared import Declared
from forgather.cli.parser import CommandParser

ROOT = Path(__file__).parents[2]
FLAG = re.compile(r"(?<![\w`-])--[a-z][a-z-]+")
# Of programs that a remedy sends somebody to, and the beginning of a family of flags.
OTHERS = {"--help", "--fresh"}


def known_flags() -> set[str]:
    """The flags of a training, and of all verbs of `forgather diloco`."""
    known = set(OTHERS)
    for name in ("train", "diloco"):
        command = CommandParser(prog=name)
        load(name).configure(command)
        for parser in (command, *command.verbs.values()):
            known |= set(parser.flags())
    return known | set(Declared(Project(ROOT / "configs" / "tiny_llama")).parser.flags())


def test_flags_that_remedies_of_diloco_name_are_taken():
    known = known_flags()
    named = {
        (flag, path.name)
        for path in (ROOT / "forgather" / "diloco").glob("*.py")
        if path.name != "page.py"  # whose style has variables of that form
        for flag in FLAG.findall(path.read_text(encoding="utf-8"))
    }
    assert len(named) > 15
    assert sorted(each for each in named if each[0] not in known) == []


def test_no_flag_is_given_a_truth_value_as_a_word():
    """`--flag false` is two words, and the second is refused: it is `--no-flag`."""
    told = re.compile(r"--[a-z-]+ (true|false)\b")
    pages = [*(ROOT / "forgather").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    assert len(pages) > 300
    assert [path.name for path in pages if told.search(path.read_text(encoding="utf-8"))] == []
