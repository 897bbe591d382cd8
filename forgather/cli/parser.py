"""Flags, verbs and positionals of a command, and the splitting of a command line by them.

argparse declares, converts and describes. The order of words is settled here first, because argparse cannot say
"anywhere": flags of a command stand before or after its verb, declared flags and `key.path=value` words anywhere.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from forgather.config.names import nearest
from forgather.errors import ForgatherError


class UsageError(ForgatherError):
    """The command line itself is wrong."""


def unknown(kind: str, name: str, known: Iterable[str], of: str = "") -> UsageError:
    """The error for a name that is none of `known`, with the nearest of them."""
    known = list(known)
    near = nearest(name, known) if name else None
    fix = f"did you mean {near}?" if near else f"one of: {', '.join(known)}" if known else None
    what = f"unknown {kind} {name!r}" if name else f"no {kind} given"
    return UsageError(f"{what} of {of}" if of and name else f"{what} to {of}" if of else what, fix=fix)


class CommandParser(argparse.ArgumentParser):
    """What a command declares in `configure`: `add_argument`, and `add_verb` when it has verbs.

    Flags added to the parser itself belong to all verbs and stand before or after the verb. A flag takes no value or
    one; a list is a flag given several times (`action="append"`).
    """

    def __init__(self, *, prog: str, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, allow_abbrev=False, add_help=False, **settings)
        self.verbs: dict[str, CommandParser] = {}
        self.summary = ""

    def add_verb(self, name: str, summary: str) -> "CommandParser":
        """A verb such as `construct` of `forgather model construct`; returns the parser of its own flags."""
        verb = CommandParser(prog=f"{self.prog} {name}", description=summary)
        verb.summary = summary
        self.verbs[name] = verb
        return verb

    def flags(self) -> dict[str, bool]:
        """Each option string of this parser (not of its verbs), and whether a value follows it."""
        for action in self._option_string_actions.values():
            assert action.nargs in (None, 0), f"{self.prog}: {action.option_strings} takes a list; use action='append'"
        return {text: action.nargs is None for text, action in self._option_string_actions.items()}

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}", fix=f"see `{self.prog} --help`")


@dataclass
class Line:
    """A command line after the command's name, sorted by what each word is."""

    flags: list[tuple[str, str | None]] = field(default_factory=list)
    positionals: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # key.path=value
    rest: list[str] | None = None  # what stands after `--`; None when there was no `--`
    unknown: list[str] = field(default_factory=list)

    def value(self, *names: str) -> str | None:
        """The value that the last of these flags was given; None when none was."""
        return next((value for name, value in reversed(self.flags) if name in names), None)

    def has(self, *names: str) -> bool:
        return any(name in names for name, _ in self.flags)

    def arguments(self) -> list[str]:
        """Flags, then positionals, in the form in which argparse reads any value, `-1e-3` too."""
        return [name if value is None else f"{name}={value}" for name, value in self.flags] + self.positionals


def split(
    tokens: Sequence[str], flags: dict[str, bool], aliases: dict[str, str], *, words: bool, num_plain: int = 0
) -> Line:
    """Sort `tokens`; `flags` says which flags take a value, `aliases` gives the long form of short ones.

    With `words`, words with a "=" are overrides and no positionals, but for the first `num_plain` of all. A flag that
    is not known is put in `unknown`, and whatever follows it is read as if it took no value.
    """
    line = Line()
    left = list(tokens)
    while left:
        token = left.pop(0)
        if token == "--":
            line.rest = left
            break
        if not token.startswith("-") or token == "-":
            is_word = words and "=" in token and len(line.positionals) >= num_plain
            (line.words if is_word else line.positionals).append(token)
            continue
        if flags.get(token) is False:  # as a whole: `--x=null` is a flag of its own beside a nullable switch
            line.flags.append((aliases.get(token, token), None))
            continue
        name, equals, value = token.partition("=")
        if not token.startswith("--"):  # -o FILE, -oFILE, and -re for -r -e
            name, equals, value = token[:2], token[2:], token[2:].removeprefix("=")
            if equals and flags.get(name) is False:
                left.insert(0, f"-{value}")
                equals = ""
        long = aliases.get(name, name)
        if name not in flags:
            line.unknown.append(token.partition("=")[0])
        elif flags[name]:
            if not equals and (not left or left[0] in flags or left[0].startswith("--")):
                raise UsageError(f"{name} needs a value", fix=f"{name}=VALUE if the value begins with two dashes")
            line.flags.append((long, value if equals else left.pop(0)))
        elif equals:
            raise UsageError(f"{name} takes no value, and was given {value!r}")
        else:
            line.flags.append((long, None))
    return line
