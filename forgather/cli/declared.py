"""The parameters that a config declares, as flags.

What a text means, and whether it is within bounds, the configuration language decides: it knows the declarations.
"""

import argparse
from typing import Any

from forgather.cli.commands import COMMANDS, load
from forgather.cli.parser import CommandParser, UsageError
from forgather.config.parameters import Parameter
from forgather.config.project import Project
from forgather.config.tree import Plain
from forgather.errors import ConfigError

_PREFIX = "declared:"  # keeps the values of declared flags apart from a command's own in one namespace


def flag(name: str) -> str:
    """`hidden_size` -> `--hidden-size`."""
    return "--" + name.replace("_", "-")


class Declared:
    """The declared parameters of a config, as a parser with one flag for each, in order of declaration."""

    def __init__(self, project: Project) -> None:
        self.parameters = project.parameters
        self.parser = CommandParser(prog="")
        group = self.parser.add_argument_group(f"Dynamic arguments (declared by config {project.config_name!r})")
        for name, parameter in self.parameters.items():
            settings: dict[str, Any] = {
                "dest": _PREFIX + name,
                "default": argparse.SUPPRESS,
                "help": _describe(parameter).replace("%", "%%"),
            }
            if parameter.type == "bool":
                group.add_argument(flag(name), action=argparse.BooleanOptionalAction, **settings)
                if parameter.is_nullable:
                    settings["help"] = f"make {flag(name)} null"
                    group.add_argument(f"{flag(name)}=null", action="store_const", const=None, **settings)
            else:
                choices = "{" + ",".join(map(_text, parameter.choices)) + "}" if parameter.choices else None
                group.add_argument(flag(name), metavar=choices or name.upper(), **settings)

    def take(self, options: argparse.Namespace) -> dict[str, Any]:
        """Take the parameters that were given out of a parsed namespace, as values of their types."""
        given = {key: value for key, value in vars(options).items() if key.startswith(_PREFIX)}
        values = {}
        for key, value in given.items():
            delattr(options, key)
            name = key.removeprefix(_PREFIX)
            if value == "" and self.parameters[name].type == "path":  # it would be the working directory
                raise UsageError(f"{flag(name)} is empty", fix=f"name a folder or a file, as {flag(name)} ./mine")
            is_text = isinstance(value, str)  # a switch of a bool has its value already
            values[name] = self.parameters[name].parse(value, f"{flag(name)} {value}") if is_text else value
        return values


def _flags(parameter: Parameter) -> list[str]:
    """What sets a parameter: a bool is switched off by a flag of its own."""
    switches_off = [f"--no-{flag(parameter.name).removeprefix('--')}"] if parameter.type == "bool" else []
    return [flag(parameter.name), *switches_off]


def _describe(parameter: Parameter) -> str:
    default = "required" if parameter.is_required else f"default: {_text(parameter.default)}"
    return f"{parameter.help} ({default})".lstrip()


def _text(value: Plain) -> str:
    """Plain data as one would write it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)


def refuse_reserved(project: Project) -> None:
    """Raise when a parameter's flag is another's too, or hides one of a command that works on this kind of config."""
    if not project.parameters:
        return
    owners: dict[str, Parameter] = {}
    for parameter in project.parameters.values():
        for each in _flags(parameter):
            other = owners.setdefault(each, parameter)
            if other is not parameter:
                raise ConfigError(
                    f"{parameter.place}: parameters {other.name!r} and {parameter.name!r} would both be {each}",
                    fix="give one of them another name",
                )
    for command in COMMANDS:
        module = load(command)
        if not module.NEEDS_CONFIG or not all(project.has(target) for target in getattr(module, "TARGETS", ())):
            continue
        parser = CommandParser(prog=f"forgather {command}")
        module.configure(parser)
        taken = {"--project", "--config", "--help", *parser.flags()}
        for verb in parser.verbs.values():
            taken.update(verb.flags())
        for name, parameter in project.parameters.items():
            for each in _flags(parameter):
                if each in taken:
                    raise ConfigError(
                        f"{parameter.place}: parameter {name!r} would hide {each} of `forgather {command}`",
                        fix="give the parameter another name",
                    )
