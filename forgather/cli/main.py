"""Where every command starts: finds the command, runs it, and turns errors into text and an exit code.

Nothing but the table of commands is imported before the command is known, so that help is instant.
"""

import errno
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from forgather.cli.commands import COMMANDS
from forgather.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_OK, ForgatherError

if TYPE_CHECKING:
    from forgather.config.project import Project

_FULL = (errno.ENOSPC, errno.EDQUOT)

USAGE = "usage: forgather [-p DIR] [-t CONFIG] COMMAND [flags] [key.path=value ...]"
HELP = """
Trains language models from configuration.

commands:
{commands}

options:
  -p, --project DIR     project folder, or any folder below it (default: the working directory)
  -t, --config CONFIG   config of the project (default: the project's default)
  --version             show the version
  -h, --help            show this help; `forgather COMMAND --help` shows the flags of a command and of the config

-p and -t may stand before or after the command. `key.path=value` overrides one value of the config."""

_TAKE_VALUE = ("-p", "--project", "-t", "--config")

# PyTorch reads it when it first takes memory: that of large tensors is then of huge pages, where the system gives them
# to whoever asks. What goes through a whole model, an optimizer or an exchange, is up to three times faster.
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault(_HUGE_PAGES, "1")
    try:
        return _run_as_rank(arguments) if "RANK" in os.environ else _run(arguments)
    except ForgatherError as error:
        from forgather.cli.terminal import print_error

        print_error(error)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return EXIT_BROKEN_PIPE


def _drop_output() -> None:
    """Let stdout lead nowhere: nobody takes what it holds, and Python flushes it once more on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _full(error: OSError) -> ForgatherError:
    where = repr(str(error.filename)) if error.filename else "the output"
    return ForgatherError(f"{where} cannot be written: {error.strerror}", fix="make room on its disk")


def _run(arguments: Sequence[str]) -> int:
    """Run a command; what the user can mend leaves as a ForgatherError, all else is a defect of ours."""
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # here, so that what cannot be written is told like every other failure
        return code
    except (ForgatherError, BrokenPipeError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _full(error) from error
        if not hasattr(error, "__notes__"):
            raise
        from forgather.config.blame import user_error

        mendable = user_error(error)
        if mendable is None:
            raise
        raise mendable from error


def _run_as_rank(arguments: Sequence[str]) -> int:
    """One of several processes that torchrun started: they give one message between them, not one each."""
    from forgather.cli.terminal import print_error
    from forgather.distributed.failure import OneMessage, check_rank_variables, exit_code_for_agent

    check_rank_variables()
    with OneMessage(print_error):
        return exit_code_for_agent(_run(arguments))


def _dispatch(arguments: Sequence[str]) -> int:
    place = _place_of_command(arguments)
    before = arguments[:place]
    if "--version" in before:
        from forgather import __version__

        print(f"forgather {__version__}")
        return EXIT_OK
    if "-h" in before or "--help" in before or not arguments:
        print(top_level_help())
        return EXIT_OK

    from forgather.cli.parser import UsageError, unknown

    stray = next((word for word in before if word.startswith("-") and not _is_selection(word)), None)
    if stray is not None:
        raise UsageError(f"{stray} stands before the command", fix="only -p and -t may; put it behind the command")
    if place == len(arguments):
        raise unknown("command", "", COMMANDS)
    name = arguments[place]
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    _require_working_directory()
    if name == "diloco":
        from forgather.cli.diloco_worker import as_train

        if (train := as_train(arguments)) is not None:
            return _dispatch(train)
    from forgather.cli.options import read_options

    options = read_options(name, [*before, *arguments[place + 1 :]], argv=arguments)
    if options is None:  # --help was asked for, and given
        return EXIT_OK
    if getattr(options.command, "TARGETS", ()):
        _note_output(options.project)  # and tells a config of another kind before what takes seconds is imported
    code: int = options.command.run(options)
    return code


def _note_output(project: "Project") -> None:
    """Say where outputs go when it is not where the next command, run elsewhere, would look for them."""
    from forgather.config.files import is_installed

    if project.output != project.dir and not is_installed(project.dir) and "RANK" not in os.environ:
        where = f"outputs go below {project.output}: go on from there"
        print(f"note: {project.dir} cannot be written, so {where}", file=sys.stderr)


def _require_working_directory() -> None:
    """Every path is read from it. Raises when it has been deleted."""
    try:
        os.getcwd()  # noqa: PTH109  (pathlib takes longer to import than the rest of this file)
    except FileNotFoundError:
        raise ForgatherError("the working directory has been deleted", fix="change to a folder that exists") from None


def _place_of_command(arguments: Sequence[str]) -> int:
    """Index of the first word that is neither a flag nor the value of one; the number of arguments if there is none."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("-"):
        place += 2 if arguments[place] in _TAKE_VALUE else 1
    return min(place, len(arguments))


def _is_selection(word: str) -> bool:
    return word.partition("=")[0] in _TAKE_VALUE or (word[:2] in ("-p", "-t") and not word.startswith("--"))


def top_level_help() -> str:
    """The table of commands and the flags that all of them share."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return USAGE + "\n" + HELP.format(commands=commands)
