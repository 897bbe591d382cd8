"""A small project without torch: a sound config that declares one parameter of each kind, and a broken one."""

import os
from types import SimpleNamespace

import pytest

from forgather.cli.main import main

PROJECT = """
name: demo
description: A project of tests
default: train
"""

BASE = """
args:
  hidden_size: {type: int, default: 512, min: 1, help: "Model hidden dimension size (d_model), 100% of it"}
  window: {type: int?, default: null, help: "Sliding window size. 'null' for disabled"}
main: !singleton:types:SimpleNamespace
  steps: ${steps}
  hidden_size: ${hidden_size}
  window: ${window}
  lr: ${lr}
  tie: ${tie}
  mode: ${mode}
  options: ${options}
  out: ${out}
"""

TRAIN = """
extends: ../base.yaml
description: Trains nothing at all
args:
  steps: 300
  lr: 3e-4
  tie: {type: bool, default: false, help: Tie embeddings}
  mode: {type: str, default: fast, choices: [fast, slow]}
  options: {type: yaml, default: {a: 1}}
  out: {type: path, default: "${join(project.dir, 'out')}"}
environment: {}
numbers: [1, 2, 3]
total: !singleton:sum [!ref numbers ]
"""

BROKEN = """
extends: ../base.yaml
main: {stesp: ${stepz}}
"""


@pytest.fixture
def project(tmp_path):
    """The folder of the project."""
    folder = tmp_path / "demo"
    (folder / "configs").mkdir(parents=True)
    (folder / "project.yaml").write_text(PROJECT)
    (folder / "base.yaml").write_text(BASE)
    (folder / "configs" / "train.yaml").write_text(TRAIN)
    return folder


@pytest.fixture
def broken(project):
    """The same project with a second config that cannot be read."""
    (project / "configs" / "broken.yaml").write_text(BROKEN)
    return project


@pytest.fixture
def forgather(project, capsys, monkeypatch):
    """Runs a command line in the project, in this process; returns its code, out and err."""
    monkeypatch.chdir(project)
    monkeypatch.delenv("RANK", raising=False)

    def run(*arguments: str) -> SimpleNamespace:
        code = main(arguments)
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return run


@pytest.fixture(autouse=True)
def no_colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not os.environ.get("FORCE_COLOR")
