"""Tensors made of tensors of other names: transposed, cut, joined, or the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from forgather.conversion.safetensors_file import TensorKind
from forgather.conversion.shards import Stream
from forgather.errors import ModelError


def _same(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


@dataclass(frozen=True)
class Recipe:
    """One tensor, by `make`, of those called `names`; no bit of any is changed or lost."""

    names: tuple[str, ...]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor] = _same


Recipes = Mapping[str, Recipe]


def kinds_made(recipes: Recipes, kinds: Mapping[str, TensorKind]) -> dict[str, TensorKind]:
    """Shape and dtype of what the recipes make. Every name that they use is in `kinds`."""
    made = {}
    for name, recipe in recipes.items():
        dtypes = {kinds[source].dtype for source in recipe.names}
        if len(dtypes) > 1:
            raise ModelError(
                f"{name} would be joined of tensors of several dtypes: {', '.join(recipe.names)}",
                fix="convert the weights to one dtype first",
            )
        on_meta = [
            torch.empty(kinds[source].shape, dtype=kinds[source].dtype, device="meta") for source in recipe.names
        ]
        made[name] = TensorKind(tuple(recipe.make(on_meta).shape), dtypes.pop())
    return made


def following(recipes: Recipes, stream: Stream) -> Stream:
    """The stream of what the recipes make, from the stream of what they make it of."""

    def made(names: Sequence[str]) -> Iterator[torch.Tensor]:
        sources = iter(stream([source for name in names for source in recipes[name].names]))
        for name in names:
            recipe = recipes[name]
            if len(recipe.names) == 1:
                yield recipe.make([next(sources)])
            else:  # each is good only until the next is asked for
                yield recipe.make([next(sources).clone() for _ in recipe.names])

    return made


def differences(recipes: Recipes, wanted: Mapping[str, tuple[int, ...]], kinds: Mapping[str, TensorKind]) -> list[str]:
    """Where the weights that are there differ in name or shape from what the recipes for `wanted` need."""
    used = {source for recipe in recipes.values() for source in recipe.names}
    missing = sorted(used - kinds.keys())
    found = [f"{name} is missing" for name in missing]
    found += [f"{name} is there, and the model has none" for name in sorted(kinds.keys() - used)]
    whole = {name: recipe for name, recipe in recipes.items() if not set(recipe.names) & set(missing)}
    made = kinds_made(whole, kinds)
    found += [
        f"{', '.join(recipes[name].names)} gives {list(made[name].shape)}, the model has {list(wanted[name])}"
        for name in made
        if made[name].shape != wanted[name]
    ]
    return found
