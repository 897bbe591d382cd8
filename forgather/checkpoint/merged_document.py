"""One state of the parts that ranks give of it. Like all that the background writer is made of, this knows no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from forgather.errors import CheckpointError

if TYPE_CHECKING:
    from forgather.checkpoint.document import Json

# A rank, and what it gives.
Part: TypeAlias = "tuple[int, Json]"
# A dict with other keys than plain strings, as pairs.
_ITEMS = "__items__"


def merge(documents: Sequence["Json"], path: str = "extras") -> "Json":
    """The parts that ranks give, in their order, of one state: dicts with the keys of all, and of what is no dict the
    first rank's.

    CheckpointError, naming the place below `path`, where one has a dict, and another has something else.
    """
    return _merge(list(enumerate(documents)), path)


def _merge(parts: Sequence[Part], path: str) -> "Json":
    dicts = [(rank, items) for rank, part in parts if (items := _items(part)) is not None]
    if not dicts:
        return parts[0][1]
    if len(dicts) < len(parts):
        other, value = next((rank, part) for rank, part in parts if _items(part) is None)
        raise CheckpointError(
            f"ranks give states of different kinds under one name: {path} is a dict on rank {dicts[0][0]}, and "
            f"{_kind(value)} on rank {other}",
            fix=f"let the state_dict() of {path.split('/')[1]!r} give a dict on every rank, or on none"
            if "/" in path
            else "let its state_dict() give a dict on every rank, or on none",
        )
    merged: dict[str | int, list[Part]] = {}
    for rank, items in dicts:
        for key, item in items:
            merged.setdefault(key, []).append((rank, item))
    whole: list[tuple[str | int, Json]] = [(key, _merge(found, f"{path}/{key}")) for key, found in merged.items()]
    if any(isinstance(part, dict) and _ITEMS in part for _, part in parts):
        return {_ITEMS: [[key, item] for key, item in whole]}
    return {str(key): item for key, item in whole}


def _items(document: "Json") -> "list[tuple[str | int, Json]] | None":
    """The keys and values of what was a dict before it became JSON, None of anything else."""
    if not isinstance(document, dict):
        return None
    pairs = document.get(_ITEMS)
    if isinstance(pairs, list):
        return [(pair[0], pair[1]) for pair in pairs if isinstance(pair, list) and isinstance(pair[0], str | int)]
    if any(key.startswith("__") for key in document):
        return None
    return list(document.items())


def _kind(document: "Json") -> str:
    # Of a dict that stands for something else, what that is.
    return next(iter(document)).strip("_") if isinstance(document, dict) else type(document).__name__
