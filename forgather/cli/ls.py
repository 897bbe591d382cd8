"""`forgather ls`: the configs of a project, or of all projects below a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.config.files import (
    PROJECT_FILE,
    ConfigSummary,
    find_project,
    list_configs,
    named_folder,
    read_project,
    shipped_configs,
)
from forgather.config.project import Project
from forgather.errors import EXIT_OK, ConfigError, ForgatherError

SUMMARY = "List the configs of a project"
NEEDS_CONFIG = False


def configure(parser: CommandParser) -> None:
    """Where and how far to look, and whether to count parameters."""
    parser.add_argument("folder", nargs="?", metavar="DIR", help="where to look, as with -p")
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="list every project below the folder instead of the one above it"
    )
    parser.add_argument("--size", action="store_true", help="show the number of parameters of configs of models")
    parser.epilog = "The config marked * is the one that is used without -t. A config that cannot be read says why."


def run(options: Options) -> int:
    """Print each project with its configs; a broken one hides no other."""
    options.project_dir = options.folder or options.project_dir
    if options.recursive:
        folders = list(find_projects(named_folder(options.project_dir)))
        if not folders:
            raise ConfigError(
                f"no project below {Path(options.project_dir).absolute()}", fix="name a folder with -p DIR"
            )
    else:
        folders = [find_project(options.project_dir)]
    print("\n\n".join(_describe(folder, options) for folder in folders))
    return EXIT_OK


def find_projects(start: Path) -> Iterator[Path]:
    """The folders with a project.yaml at or below `start`, in order of name; hidden folders are not entered."""
    for folder, below, files in os.walk(start):
        below[:] = sorted(name for name in below if not name.startswith((".", "__")))
        if PROJECT_FILE in files:
            yield Path(folder)


def _describe(folder: Path, options: Options) -> str:
    try:
        project = read_project(folder)
        configs = list_configs(folder)
    except ForgatherError as error:
        return f"{_named(folder, options)}\n    broken: {_indented(error)}"
    lines = [f"{project.name}  {project.description}".rstrip() + f"  ({_named(folder, options)})"]
    width = max((len(_name(config)) for config in configs), default=0)
    for config in configs:
        mark = "*" if config.is_default else " "
        lines.append(f"  {mark} {_name(config):<{width}}  {_row(folder, config, options)}".rstrip())
    if not configs:
        lines.append(f"    no configs in {_shown(project.configs)}")
    return "\n".join(lines)


def _row(folder: Path, config: ConfigSummary, options: Options) -> str:
    if config.error is not None:
        return f"broken: {config.error}".replace("\n", "\n      ")
    try:
        project = Project(folder, config.name)
        size = _size(project) if options.size else ""
    except ForgatherError as error:
        return f"broken: {_indented(error)}"
    return f"{size}{config.description}"


def _size(project: Project) -> str:
    from forgather.cli.size import num_parameters

    count = num_parameters(project)
    return " " * 10 if count is None else f"{_short(count):>8}  "


def _short(count: int) -> str:
    """`8.4M`, `1.2B`: three digits are what a list is compared by."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _name(config: ConfigSummary) -> str:
    return config.name.removesuffix(".yaml")


def _named(folder: Path, options: Options) -> str:
    """What -p takes: `lib:NAME` when it was asked for so."""
    if options.project_dir.startswith("lib:") and folder.is_relative_to(shipped_configs()):
        return f"lib:{folder.relative_to(shipped_configs()).as_posix()}"
    return _shown(folder)


def _shown(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _indented(error: ForgatherError) -> str:
    return str(error).replace("\n", "\n      ")
