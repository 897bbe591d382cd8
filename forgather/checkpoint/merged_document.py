"""One state of the parts that ranks give of it. Like all that the background writer is made of, this knows no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from forgather.errors import CheckpointError

if TYPE_CHECKING:
    from forgather.checkpoint.document import Json


def merge(documents: Sequence["Json"]) -> "Json":
    """The parts that ranks give of one state: what several give as the first does, dicts with the keys of all.

    CheckpointError where one has a dict, and another has something else in its place.
    """
    first = documents[0]
    if not any(_is_plain_dict(each) for each in documents):
        return first
    if not all(_is_plain_dict(each) for each in documents):
        raise CheckpointError(
            "ranks give states of different kinds under one name",
            fix="let its state_dict() give a dict on every rank, or on none",
        )
    merged: dict[str, list[Json]] = {}
    for each in documents:
        for key, item in each.items() if isinstance(each, dict) else ():
            merged.setdefault(key, []).append(item)
    return {key: merge(items) for key, items in merged.items()}


def _is_plain_dict(document: "Json") -> bool:
    return isinstance(document, dict) and not any(key.startswith("__") for key in document)
