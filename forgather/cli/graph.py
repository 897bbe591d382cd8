"""`forgather graph`: which object refers to which, for a viewer of Mermaid or Graphviz."""

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.errors import EXIT_OK

SUMMARY = "Draw which object refers to which"
NEEDS_CONFIG = True


def configure(parser: CommandParser) -> None:
    """The format."""
    parser.add_argument(
        "--format", choices=("mermaid", "dot"), default="mermaid", help="language of the drawing (default: mermaid)"
    )


def run(options: Options) -> int:
    """Print the source of the drawing."""
    print(options.project.graph(format=options.format).rstrip("\n"))
    return EXIT_OK
