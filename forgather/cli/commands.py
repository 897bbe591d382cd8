"""The table of commands: `forgather --help` reads this and imports nothing else.

A command is a module of `forgather.cli`, imported when it is chosen. It has

    SUMMARY = "..."                                  # the line of this table again, for its own --help
    NEEDS_CONFIG = True                              # takes the config's declared flags, and key.path=value words
    TARGETS = ("main",)                              # optional: targets that the config must have to be of its kind
    PLAIN = 2                                        # optional: so many positionals come first, and may hold an "="
    REST = "torchrun arguments"                      # optional: what words after `--` are; without it there are none
    def configure(parser: CommandParser) -> None     # its flags, positionals and verbs
    def run(options: Options) -> int                 # the exit code

and imports nothing heavy at module level.
"""

from importlib import import_module
from types import ModuleType

COMMANDS = {
    "ls": ("forgather.cli.ls", "List the configs of a project"),
    "show": ("forgather.cli.show", "Show what a config says once all is merged and resolved"),
    "targets": ("forgather.cli.targets", "List what a config can build"),
    "graph": ("forgather.cli.graph", "Draw which object refers to which"),
    "code": ("forgather.cli.code", "Print the Python source that builds a target"),
    "construct": ("forgather.cli.construct", "Build a target and print it"),
    "check": ("forgather.cli.check", "Check names, arguments and references without building anything"),
    "project": ("forgather.cli.project", "Start a project"),
    "model": ("forgather.cli.model", "Construct or test a model"),
    "dataset": ("forgather.cli.dataset", "Prepare or inspect a dataset"),
    "train": ("forgather.cli.train", "Train a model, or continue the run that is there"),
    "parity": ("forgather.cli.parity", "Run two meshes of one config beside each other, and say where they differ"),
    "control": ("forgather.cli.control", "Ask, save, stop or steer a live run"),
    "diloco": ("forgather.cli.diloco", "Train one model over a network of unequal machines"),
    "checkpoint": ("forgather.cli.checkpoint", "List, inspect, verify, compare or remove checkpoints"),
    "import": ("forgather.cli.import_", "Make a model package of a Hugging Face model"),
    "export": ("forgather.cli.export", "Write a Hugging Face folder from a run, a checkpoint or a package"),
    "vocab": ("forgather.cli.vocab", "Add tokens to a model and its tokenizer"),
}


def load(name: str) -> ModuleType:
    """Import the module of a command of the table."""
    return import_module(COMMANDS[name][0])
