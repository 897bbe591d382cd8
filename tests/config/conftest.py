"""Projects written by tests: `project(main="...")` makes one and loads it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from forgather import Project
from forgather.errors import ConfigError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes configs by name, other files by path, into one project; the working directory is its folder."""
    monkeypatch.chdir(tmp_path)

    def write_files(files: Mapping[str, str] | None = None, **configs: str) -> Path:
        texts = {"project.yaml": "default: main\n", **(files or {})}
        texts |= {f"configs/{name}.yaml": text for name, text in configs.items()}
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(dedent(text))
        return tmp_path

    return write_files


@pytest.fixture
def load(write: Write) -> Callable[..., Project]:
    """Writes `main` and whatever else is named, and loads it."""

    def load_project(main: str, files: Mapping[str, str] | None = None, **options: Any) -> Project:
        return Project(write(files, main=main), **options)

    return load_project


@pytest.fixture
def refused(load: Callable[..., Project]) -> Callable[..., str]:
    """Loads and checks a config that must be refused; returns what is said."""

    def error_of(main: str, files: Mapping[str, str] | None = None, **options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            load(main, files, **options).check()
        return str(caught.value)

    return error_of
