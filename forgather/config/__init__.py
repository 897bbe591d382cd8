"""The configuration language: YAML files that inherit from one another, and the objects they name.

    YAML files --read--> located data --merge--> one tree --resolve--> node graph --build--> objects
                                                                            |
                                                                            +------emit--> Python source

`Project` is what most users need. The stages are modules that can be used alone: `read.read_file`, `merge.merge`,
`inherit.Loader`, `resolve.Namespace`, `session.Session`, `emit.emit`. Nothing here imports torch.
"""

from importlib import import_module
from typing import Any

# Loaded on first use: who wants the list of configs does not pay for expressions and signatures.
_PUBLIC = {
    "Project": "project",
    "Session": "session",
    "Parameter": "parameters",
    "find_project": "files",
    "list_configs": "files",
    "shipped_configs": "files",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
