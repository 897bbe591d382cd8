"""Whatever is written, looking at a config ends in a ConfigError that names a place, or in nothing."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather import Project
from forgather.errors import ConfigError
from tests.config.test_emit_property import COMMON, OTHER, configs

SCRAPS = """!ref !singleton: !factory:dict !partial: !function !symbol: !project !code !values !tuple !delete !replace
!append !patch:dict ${ } { [ ] , : - null ~ yes 1e-4 "" ' " & * << # \t extends: args: description: main: params:
result: dir: with: set: t0 t1 ${t0} ${t1.k0} ${number "*" .inf \\ %""".split()  # noqa: SIM905


PLACES = ["main", "main.a", "xs[0]", "p.set", "p.args.x", ""]


@st.composite
def damaged(draw: Callable[[Any], Any]) -> str:
    text, _, _ = draw(configs())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 8)))
        scrap = draw(st.sampled_from(["", "", "\n", " ", *SCRAPS]) | st.text(max_size=2))
        text = text[:start] + scrap + text[end:]
    return text


def error_of(stage: Callable[[], object]) -> str | None:
    try:
        stage()
    except ConfigError as error:
        return str(error)
    return None


def look(folder: Path, text: str) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        (folder / "configs/main.yaml").write_text(text.replace("dir: other", f"dir: {folder / 'other'}"))
        with contextlib.suppress(ConfigError):
            project = Project(folder)
            for stage in (project.show, project.graph, project.check, lambda: project.digest):
                said = error_of(stage)
                assert said is None or "main.yaml" in said, f"no place in {said}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damaged")
    for each in (path, path / "other"):
        (each / "configs").mkdir(parents=True)
        (each / "project.yaml").write_text("default: main\n")
    (path / "other/configs/main.yaml").write_text(OTHER)
    return path


@settings(max_examples=150, **COMMON)
@given(text=damaged())
def test_damage_is_told_as_a_config_error(folder: Path, text: str):
    look(folder, text)


@pytest.mark.soak
@settings(max_examples=5000, **COMMON)
@given(text=damaged())
def test_damage_is_told_as_a_config_error_at_length(folder: Path, text: str):
    look(folder, text)


@settings(max_examples=150, **COMMON)
@given(st.text("ab.[]{}\"'=!:- $\n0", max_size=12), st.sampled_from(PLACES))
def test_words_are_told_as_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str, path: str):
    folder = tmp_path_factory.getbasetemp() / "words"
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "project.yaml").write_text("")
    (folder / "configs/main.yaml").write_text("main: !singleton:dict {a: 1}\nxs: [1]\np: !project {dir: ..}\n")
    for word in (f"{path}={text}", f"{path}{text}=1", text):
        with contextlib.suppress(ConfigError):
            Project(folder, words=[word]).show()
