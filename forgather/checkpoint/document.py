"""A nested state as JSON and named tensors.

Hooks, the loader and the generators of random numbers have states of any shape: dicts of numbers, lists, here and
there a tensor. Tensors go where all tensors go, under a name made of their path, and may be sharded; the rest is
JSON. No pickle: opening a checkpoint runs no code, and what cannot be kept is refused when it is saved, not when it is
needed.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from forgather.errors import CheckpointError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

# Marks a JSON object that stands for something else than a dict with string keys.
_TENSOR, _TUPLE, _ITEMS, _FLOAT = "__tensor__", "__tuple__", "__items__", "__float__"


def split(value: Any, path: str) -> tuple[Json, dict[str, torch.Tensor]]:
    """`value` as JSON, and its tensors by name; names begin with `path`. `join` is the inverse.

    Takes None, bool, int, float, str, lists, tuples, dicts with str or int keys, and tensors. CheckpointError for
    anything else, and where the paths of two tensors are one.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _split(value, path, tensors), tensors


# No function within `split`: one that calls itself lives, with the tensors that it knows, until the next collection of
# garbage, and a hook's may be a copy of the model.
def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Json:
    if isinstance(value, torch.Tensor):
        if path in tensors:
            raise CheckpointError(
                f"the state has two tensors that would both be saved as {path}",
                fix="let keys in its state_dict() have no '/', and not be equal as text (1 and '1')",
            )
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}  # JSON has no infinity, and not every reader takes Python's
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_split(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [_split(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: _split(item, f"{path}/{key}", tensors) for key, item in value.items()}
        return {_ITEMS: [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    raise CheckpointError(
        f"the state {path} holds a {type(value).__name__}, which a checkpoint does not carry",
        fix="let its state_dict() give numbers, strings, tensors, and lists, tuples and dicts of these",
    )


def join(document: Json, tensors: Mapping[str, torch.Tensor], *, partly: bool = False) -> Any:
    """What `split` took apart. With `partly` tensors may be missing: dicts are then left without them."""
    if isinstance(document, list):
        return [join(item, tensors, partly=partly) for item in document]
    if not isinstance(document, dict):
        return document
    match document:
        case {"__tensor__": str(name)}:
            return tensors[name]
        case {"__float__": str(number)}:
            return float(number)
        case {"__tuple__": list(items)}:
            return tuple(join(item, tensors, partly=partly) for item in items)
        case {"__items__": list(items)}:
            return {pair[0]: join(pair[1], tensors, partly=partly) for pair in items if isinstance(pair, list)}
    return {
        key: join(item, tensors, partly=partly)
        for key, item in document.items()
        if not (partly and isinstance(item, dict) and _TENSOR in item and item[_TENSOR] not in tensors)
    }
