"""A model package as a plain Hugging Face model: transformers' own class, its config, its names.

What that class cannot say is refused, with the reason, before a weight is read: a size it has no place for, a part that
the family's project does not have there, a parameter too many.
"""

import re
import shutil
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from forgather.config.project import Project
from forgather.conversion.families import FAMILIES, Family
from forgather.conversion.listing import listed
from forgather.conversion.package_model import StoredModel
from forgather.conversion.recipes import differences, following, kinds_made
from forgather.conversion.shards import converted, tell_dtype, write_shards
from forgather.conversion.ties import require_equal_ties
from forgather.conversion.verify import converting, on_meta, require_equal, require_same_computation, shapes_of
from forgather.conversion.weight_sources import open_weights
from forgather.errors import ConfigError, ModelError
from forgather.models.construct import load_classes
from forgather.models.package import MANIFEST as PACKAGE_MANIFEST


def write_native(model: StoredModel, folder: Path, max_shard_bytes: int, dtype: torch.dtype | None) -> None:
    """Write `model` into the empty `folder`, and compare the logits of what was written with its own.

    ModelError where transformers' class of its family does not compute the same.
    """
    files = model.files()
    classes = load_classes(model.package)
    family = _family(model, classes.config)
    config = _stock_config(model, family, classes.config)
    ours, stock = on_meta(classes.model, classes.config), on_meta(family.model_class, config)
    _require_parts(model, family, ours)
    shapes = shapes_of(stock)
    recipes = {name: family.stock_recipe(name) for name in shapes}
    ties = ours.all_tied_weights_keys
    # Files of torch.save have a tied weight under each of its names.
    there = {name: kind for name, kind in model.kinds.items() if ties.get(name) not in model.kinds}
    if found := differences(recipes, shapes, there):
        raise _inexpressible(model, family, found)
    require_same_computation(classes.model, classes.config, family.model_class, config, family.package_recipe)
    require_equal_ties(ties, {name: name for name in model.kinds}, model.reader(), str(model.path))

    for file in files:
        if file.suffix != ".py" and file.name not in ("config.json", PACKAGE_MANIFEST):
            shutil.copy(file, folder / file.name)
    kinds = converted(kinds_made(recipes, there), dtype)
    config.architectures = [family.model_class.__name__]
    config.save_pretrained(folder)
    tell_dtype(folder / "config.json", kinds)
    write_shards(folder, kinds, max_shard_bytes, following(recipes, model.stream))
    require_equal(stock, lambda: open_weights(folder).read, ours, lambda: converting(model.reader(), dtype))


def _family(model: StoredModel, config: PreTrainedConfig) -> Family:
    kind = getattr(config, "hf_model_type", None)
    if kind not in FAMILIES:
        projects = ", ".join(f"models/{family.project}" for family in FAMILIES.values())
        said = "names no hf_model_type" if kind is None else f"names the hf_model_type {kind!r}, which is not known"
        raise ModelError(
            f"{model.package / 'config.json'} {said}: no class of transformers is known to compute the same",
            fix=f"export it as a package (--as package); models of {projects} can be exported as native",
        )
    return FAMILIES[kind]


def _stock_config(model: StoredModel, family: Family, config: PreTrainedConfig) -> PreTrainedConfig:
    if untold := family.untold(config):
        raise _inexpressible(model, family, [f"config.json: {line}" for line in untold])
    try:
        return family.stock_config(config)
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise _inexpressible(model, family, [f"config.json: {error}"]) from error


def _require_parts(model: StoredModel, family: Family, ours: PreTrainedModel) -> None:
    """Compare the modules with those of the family's project: transformers' class is known to be equal to them."""
    project = Project(f"lib:models/{family.project}")
    try:
        with torch.device("meta"):
            usual = project.build("model", given={"hf_config": ours.config})
    except ConfigError as error:  # the package is older than the project, which has learnt to read more
        raise _inexpressible(
            model, family, [f"config.json lacks what the project reads today: {error.message}"]
        ) from error
    there, expected = _traits(ours), _traits(usual)
    stock = family.model_class.__name__
    found = [
        f"{name} is {there.get(name)}, and {stock} has {expected.get(name)} there"
        for name in [*expected, *(there.keys() - expected.keys())]
        if there.get(name) != expected.get(name)
    ]
    if found:
        # Layers are mostly alike.
        found = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", line) for line in found))
        raise _inexpressible(model, family, found)


def _traits(model: nn.Module) -> dict[str, object]:
    """What each module is, its parameters, numbers and switches; nothing where one is zero, off or not there.

    So a part that has learnt something new, and does not do it here, is equal to what it was before. The model and its
    trunk have class names of their own.
    """
    traits: dict[str, object] = {}
    for name, module in model.named_modules():
        if name not in ("", "model"):
            traits[name] = type(module).__name__
            for key, value in vars(module).items():
                is_plain = isinstance(value, (int, float, str, tuple)) and not key.startswith("_")
                if is_plain and value and key != "training":
                    traits[f"{name}.{key}"] = value
            for key, parameter in module.named_parameters(recurse=False):
                traits[f"{name}.{key}"] = list(parameter.shape)
    return traits


def _inexpressible(model: StoredModel, family: Family, reasons: list[str]) -> ModelError:
    return ModelError(
        f"{family.model_class.__name__} of transformers cannot be the model in {model.package}:{listed(reasons)}",
        fix="export it as a package (--as package)",
    )
