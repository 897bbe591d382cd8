"""The parameters that a config declares, as flags.

Texts given on the command line are handed on as they are: the configuration language knows the types, the bounds and
the place of each declaration.
"""

import argparse
from importlib.util import find_spec
from typing import Any

from forgather.cli.commands import COMMANDS, load
from forgather.cli.parser import CommandParser
from forgather.config.project import Project
from forgather.errors import ConfigError

_PREFIX = "declared:"  # keeps the values of declared flags apart from a command's own in one namespace


def flag(name: str) -> str:
    """`hidden_size` -> `--hidden-size`."""
    return "--" + name.replace("_", "-")


def add_declared(project: Project) -> CommandParser:
    """A parser with one flag for each declared parameter, in order of declaration."""
    parser = CommandParser(prog="")
    group = parser.add_argument_group(f"Dynamic arguments (declared by config {project.config_name!r})")
    for name, parameter in project.parameters.items():
        settings: dict[str, Any] = {
            "dest": _PREFIX + name,
            "default": argparse.SUPPRESS,
            "help": _describe(parameter).replace("%", "%%"),
        }
        if parameter.type.rstrip("?") == "bool":
            group.add_argument(flag(name), action=argparse.BooleanOptionalAction, **settings)
        else:
            metavar = "{" + ",".join(map(str, parameter.choices)) + "}" if parameter.choices else name.upper()
            group.add_argument(flag(name), metavar=metavar, **settings)
    return parser


def declared_values(options: argparse.Namespace) -> dict[str, Any]:
    """Take the declared parameters that were given out of a parsed namespace."""
    given = {key: value for key, value in vars(options).items() if key.startswith(_PREFIX)}
    for key in given:
        delattr(options, key)
    return {key.removeprefix(_PREFIX): value for key, value in given.items()}


def _describe(parameter: Any) -> str:
    return parameter.help or ""


def refuse_reserved(project: Project) -> None:
    """Raise when a declared parameter would hide a flag of a command that works on this kind of config."""
    if not project.parameters:
        return
    for command in COMMANDS:
        if find_spec(COMMANDS[command][0]) is None:
            continue
        module = load(command)
        if not module.NEEDS_CONFIG or not all(project.has(target) for target in getattr(module, "TARGETS", ())):
            continue
        parser = CommandParser(prog=f"forgather {command}")
        module.configure(parser)
        taken = {"--project", "--config", "--help", *parser.flags()}
        for verb in parser.verbs.values():
            taken.update(verb.flags())
        for name, parameter in project.parameters.items():
            if flag(name) in taken:
                raise ConfigError(
                    f"{parameter.place}: parameter {name!r} would hide {flag(name)} of `forgather {command}`",
                    fix="give the parameter another name",
                )
