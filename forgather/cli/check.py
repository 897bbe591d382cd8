"""`forgather check`: every name, argument and reference of a config, without building anything."""

from forgather.cli.declared import refuse_reserved
from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.cli.terminal import print_error, print_warning
from forgather.config.files import find_project, list_configs
from forgather.config.project import Project
from forgather.errors import EXIT_OK, ForgatherError

SUMMARY = "Check names, arguments and references without building anything"
NEEDS_CONFIG = True


def configure(parser: CommandParser) -> None:
    """One config or all of them."""
    parser.add_argument("--all", action="store_true", help="check every config of the project")


def run(options: Options) -> int:
    """Print `ok` for each sound config; raise for the one that is not, or with --all report each and return 2."""
    if not options.all:
        _check(options.project)
        return EXIT_OK
    code = EXIT_OK
    for config in list_configs(find_project(options.project_dir)):
        try:
            project = Project(options.project_dir, config.name, args=options.arguments, words=options.words)
            refuse_reserved(project)
            _check(project)
        except ForgatherError as error:
            print(f"{config.name.removesuffix('.yaml')}: broken")
            print_error(error)
            code = error.exit_code
    return code


def _check(project: Project) -> None:
    notes = project.check()
    print(f"{project.config_name}: ok")
    if not project.targets():
        print_warning(f"config {project.config_name!r} has no targets, so that there is nothing to build")
    for note in notes:
        print_warning(note)
