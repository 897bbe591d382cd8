"""One package for all tests of models, written once."""

from pathlib import Path

import pytest

from forgather.models.package import Package
from tests.models.example import package


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Package:
    built = package(tmp_path_factory.mktemp("models") / "output_models" / "tiny_llama")
    built.write()
    return built


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Package:
    built = package(tmp_path_factory.mktemp("models") / "tied_llama", tie_word_embeddings=True)
    built.write()
    return built


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "output_models" / "tiny_llama"
