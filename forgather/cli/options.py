"""From the words after a command to its options: flags, verb, the selected config, and what is overridden in it.

The config is read only when it is needed: for the flags that it declares (when a flag is not the command's own, and
in `--help`), and when a command asks for `options.project`.
"""

import argparse
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

from forgather.cli.commands import load
from forgather.cli.declared import Declared, refuse_reserved
from forgather.cli.parser import CommandParser, Line, UsageError, split, unknown
from forgather.config.project import Project
from forgather.errors import ConfigError, ForgatherError

_COMMON = {"-p": True, "--project": True, "-t": True, "--config": True, "-h": False, "--help": False}
_SHORT = {"-p": "--project", "-t": "--config", "-h": "--help"}


class Options(argparse.Namespace):
    """The flags and positionals of a command as attributes, and the config that was selected with -p and -t.

    `verb` is the verb given, or None. `rest` are the words after `--`. `argv` is the whole command line as typed.
    """

    command: ModuleType
    verb: str | None
    project_dir: str
    config_name: str | None
    arguments: dict[str, Any]  # declared parameters that were given
    words: list[str]  # key.path=value
    rest: list[str]
    argv: list[str]

    @cached_property
    def project(self) -> Project:
        """The selected config with declared flags and words applied; a ConfigError if it is of another kind."""
        project = Project(self.project_dir, self.config_name, args=self.arguments, words=self.words)
        refuse_reserved(project)
        require_kind(project, self.command)
        return project


def require_kind(project: Project, command: ModuleType) -> None:
    """Raise unless the config has the targets that the command works on."""
    missing = [target for target in getattr(command, "TARGETS", ()) if not project.has(target)]
    if missing:
        name = command.__name__.rpartition(".")[2]
        raise ConfigError(
            f"config {project.config_name!r} of {project.dir} is of another kind: `forgather {name}` needs "
            f"{', '.join(command.TARGETS)}, and it has no {', '.join(missing)}",
            fix="choose another config with -t, or another project with -p; `forgather ls -r` lists them",
        )


def read_options(name: str, tokens: Sequence[str], *, argv: Sequence[str]) -> Options | None:
    """The options of command `name` from the other words of its line; None after `--help` has been printed."""
    module = load(name)
    command = CommandParser(prog=f"forgather {name}", description=module.SUMMARY)
    module.configure(command)
    num_plain = getattr(module, "PLAIN", 0)
    line = _split(tokens, command, None, words=module.NEEDS_CONFIG, num_plain=num_plain)
    wants_help = line.has("--help")
    declared: Declared | None = None
    trouble: ForgatherError | None = None
    if module.NEEDS_CONFIG and (line.unknown or wants_help):
        try:
            declared = _declared(line, module)
        except ForgatherError as error:
            if not wants_help:
                raise
            trouble = error
        else:
            line = _split(tokens, command, declared, words=True, num_plain=num_plain)
    verb = _take_verb(command, line, declared, required=not wants_help)
    if wants_help:
        print(_final_parser(command, verb, declared, module, trouble).format_help(), end="")
        return None
    _refuse_unknown(line, command, verb, declared, module)

    options = Options()
    parser = _final_parser(command, verb, declared, module, None)
    parser.parse_args(line.arguments(), namespace=options)
    options.command = module
    options.verb = verb
    options.words = line.words
    options.arguments = declared.take(options) if declared else {}
    options.rest = line.rest or []
    options.argv = list(argv)
    return options


def _split(
    tokens: Sequence[str], command: CommandParser, declared: Declared | None, *, words: bool, num_plain: int
) -> Line:
    parsers = [*command.verbs.values(), command, *([declared.parser] if declared else [])]
    flags = {**{text: value for parser in parsers for text, value in parser.flags().items()}, **_COMMON}
    aliases = dict(_SHORT)
    for parser in parsers:
        for text, action in parser._option_string_actions.items():
            if not text.startswith("--"):
                aliases[text] = next(long for long in action.option_strings if long.startswith("--"))
    return split(tokens, flags, aliases, words=words, num_plain=num_plain)


def _declared(line: Line, module: ModuleType) -> Declared:
    """The flags that the selected config declares."""
    project = Project(line.value("--project") or ".", line.value("--config"))
    require_kind(project, module)
    refuse_reserved(project)
    return Declared(project)


def _take_verb(command: CommandParser, line: Line, declared: Declared | None, *, required: bool) -> str | None:
    if not command.verbs:
        return None
    if line.positionals:
        verb = line.positionals.pop(0)
        if verb not in command.verbs and line.unknown:  # whose value is in the place of the verb
            known = _known(command, None, declared)
            raise unknown("flag", line.unknown[0], sorted(known), of=f"`{command.prog}`")
        if verb not in command.verbs:
            raise unknown("verb", verb, command.verbs, of=f"`{command.prog}`")
        return verb
    if required:
        raise unknown("verb", "", command.verbs, of=f"`{command.prog}`")
    return None


def _refuse_unknown(
    line: Line, command: CommandParser, verb: str | None, declared: Declared | None, module: ModuleType
) -> None:
    if line.rest is not None and not hasattr(module, "REST"):
        raise UsageError(f"`{command.prog}` takes no words after `--`", fix="leave out `--` and what follows it")
    known = _known(command, verb, declared)
    prog = f"{command.prog} {verb}" if verb else command.prog
    for flag, _ in line.flags:
        if flag not in known:
            other = next(name for name, parser in command.verbs.items() if flag in parser.flags())
            raise UsageError(f"{flag} is a flag of `{command.prog} {other}`, not of `{prog}`", fix="leave it out")
    if line.unknown:
        raise unknown("flag", line.unknown[0], sorted(known), of=f"`{prog}`")


def _known(command: CommandParser, verb: str | None, declared: Declared | None) -> set[str]:
    """The flags that may stand in a line of the command, or of its verb."""
    parsers = [command, *([command.verbs[verb]] if verb else []), *([declared.parser] if declared else [])]
    return {text for parser in parsers for text in parser.flags()} | set(_COMMON)


def _final_parser(
    command: CommandParser,
    verb: str | None,
    declared: Declared | None,
    module: ModuleType,
    trouble: ForgatherError | None,
) -> CommandParser:
    """Everything in one parser, in the order in which `--help` shows it."""
    chosen = command.verbs[verb] if verb else command
    parents = [command.verbs[verb], command] if verb else [command]
    common = CommandParser(prog="")
    words = "a word `key.path=value` overrides any value of the config" if module.NEEDS_CONFIG else None
    selection = common.add_argument_group("selection", words)
    selection.add_argument(
        "-p", "--project", dest="project_dir", metavar="DIR", default=".", help="project folder, or any folder below it"
    )
    selection.add_argument("-t", "--config", dest="config_name", metavar="CONFIG", help="config of the project")
    selection.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS, help="show this help")
    return CommandParser(
        prog=chosen.prog,
        usage=_usage(command, verb, module),
        description=_description(chosen, command, verb, trouble),
        epilog=chosen.epilog,
        parents=[*parents, *([declared.parser] if declared else []), common],
    )


def _usage(command: CommandParser, verb: str | None, module: ModuleType) -> str:
    words = [command.prog, "[flags]"]
    if command.verbs:
        words.append(verb or "{" + ",".join(command.verbs) + "}")
    for action in (command.verbs[verb] if verb else command)._get_positional_actions():
        name = action.metavar if isinstance(action.metavar, str) else action.dest
        words.append(f"[{name}]" if action.nargs == "?" else name)
    if module.NEEDS_CONFIG:
        words.append("[key.path=value ...]")
    if hasattr(module, "REST"):
        words.append(f"[-- {module.REST}]")
    return " ".join(words)


def _description(
    chosen: CommandParser, command: CommandParser, verb: str | None, trouble: ForgatherError | None
) -> str:
    parts = [chosen.description or ""]
    if command.verbs and verb is None:
        width = max(map(len, command.verbs))
        rows = (f"  {name:<{width}}  {parser.summary}" for name, parser in command.verbs.items())
        parts.append("verbs:\n" + "\n".join(rows))
    if trouble is not None:
        indented = trouble.message.replace("\n", "\n  ")
        parts.append(f"Dynamic arguments are missing here, because the config cannot be read:\n  {indented}")
        if trouble.fix:
            parts.append(f"  fix: {trouble.fix}")
    return "\n\n".join(parts)
