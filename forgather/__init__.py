"""Forgather trains language models from configuration."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded on first use: `forgather --help` must cost neither torch nor the configuration language.
_PUBLIC = {"Project": "forgather.config.project", "ForgatherError": "forgather.errors"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'forgather' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
