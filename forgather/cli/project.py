"""`forgather project new`: a folder that every other command works on at once."""

import os
import re
import shutil
from pathlib import Path

from forgather.cli.options import Options
from forgather.cli.parser import CommandParser
from forgather.config.files import PROJECT_FILE, list_configs, shipped_configs
from forgather.config.names import did_you_mean
from forgather.config.project import Project
from forgather.errors import EXIT_OK, ConfigError

SUMMARY = "Start a project"
NEEDS_CONFIG = False

# What runs leave beside configs; a copy of a project takes none of it along.
_OUTPUTS = ("output_models", "runs", "prepared", "__pycache__", ".*")

_PROJECT_YAML = """\
name: {name}
description: Trains a language model
default: train
"""

_TRAIN_YAML = """\
# What is not said here is inherited: `forgather show --origin` shows every value and where it comes from.
extends: lib:train/causal_lm.yaml
description: A small Llama on the Python standard library

# Each is a flag too: `forgather train --lr 1e-3`; `forgather train --help` lists them all.
args:
  steps: 300
  lr: 3e-3
  warmup: 20
  block_length: 256
  rows_per_step: 16

# `forgather ls -r -p {shipped}` lists the models and datasets that come with Forgather.
model_project:
  dir: lib:models/llama
  config: 4M.yaml
dataset_project:
  dir: lib:datasets/python_stdlib
"""

_GITIGNORE = """\
output_models/
prepared/
runs/
"""


def configure(parser: CommandParser) -> None:
    """One verb, `new`."""
    new = parser.add_verb(
        "new", "Write the folder of a project that trains a small model, or a copy of another project"
    )
    new.add_argument("folder", metavar="NAME", help="the folder to make; its last part is the project's name")
    new.add_argument(
        "--from",
        dest="source",
        metavar="PROJECT",
        help="copy this project: its folder, or the name of one that comes with Forgather (tiny_llama, models/llama)",
    )


def run(options: Options) -> int:
    """Write the project aside, see that each of its configs can be read, and rename it into place."""
    folder = Path(options.folder)
    if os.path.lexists(folder):
        raise ConfigError(f"{folder} exists already, and nothing is overwritten", fix="choose another NAME")
    name = folder.absolute().name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"{name!r} is no name for a project", fix="use letters, digits, '_', '-' and '.'")
    # A sibling of the final folder, so that a path that leads out of it leads to the same place from here.
    made = folder.with_name(f".{name}.new")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made.mkdir()
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
        raise ConfigError(f"cannot make {folder}: {why}", fix="choose a folder that can be written") from error
    try:
        if options.source is None:
            _write(made, name)
        else:
            _copy(_find(options.source), made, name)
        for config in list_configs(made):
            Project(made, config.name)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    print(f"{folder}: {', '.join(config.name.removesuffix('.yaml') for config in list_configs(folder))}")
    print(f"try: forgather -p {folder} ls    forgather -p {folder} show    forgather -p {folder} check")
    return EXIT_OK


def _write(folder: Path, name: str) -> None:
    (folder / "configs").mkdir()
    (folder / PROJECT_FILE).write_text(_PROJECT_YAML.format(name=name), encoding="utf-8")
    (folder / "configs" / "train.yaml").write_text(_TRAIN_YAML.format(shipped=shipped_configs()), encoding="utf-8")
    (folder / ".gitignore").write_text(_GITIGNORE, encoding="utf-8")


def _find(source: str) -> Path:
    for folder in (Path(source), shipped_configs() / source.removeprefix("lib:")):
        if (folder / PROJECT_FILE).is_file():
            return folder
    shipped = [path.parent.relative_to(shipped_configs()).as_posix() for path in shipped_configs().rglob(PROJECT_FILE)]
    raise ConfigError(
        f"--from: {source!r} is neither the folder of a project nor the name of one that comes with Forgather",
        fix=did_you_mean(source.removeprefix("lib:"), shipped, what="the shipped projects"),
    )


def _copy(source: Path, folder: Path, name: str) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_OUTPUTS))
    if not (folder / ".gitignore").exists():  # that of the shipped ones stands above them all
        (folder / ".gitignore").write_text(_GITIGNORE, encoding="utf-8")
    path = folder / PROJECT_FILE
    text, count = re.subn(r"^name:.*$", f"name: {name}", path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    path.write_text(text if count else f"name: {name}\n{text}", encoding="utf-8")
