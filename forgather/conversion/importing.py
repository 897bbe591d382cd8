"""From a Hugging Face folder to a model package with weights, through the project of the family.

All that can be refused is refused by config.json and the headers of the weights, before a weight is read. Then tensors
go one by one into the shards, and the package counts as done when it computes what the model of transformers does.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from forgather.config.project import Project
from forgather.conversion.hugging_face_model import HuggingFaceModel
from forgather.conversion.listing import listed
from forgather.conversion.new_folder import only_writer, refuse_what_is_there
from forgather.conversion.recipes import Recipe, differences, following, kinds_made
from forgather.conversion.shards import MAX_SHARD_BYTES, converted, tell_dtype, write_shards
from forgather.conversion.verify import converting, on_meta, require_equal, require_same_computation, shapes_of
from forgather.conversion.weight_sources import open_weights
from forgather.durable import emptied, publish
from forgather.errors import ModelError
from forgather.models.construct import load_classes
from forgather.models.package import Package
from forgather.models.vocabulary import vocab_size

GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_PROBE = "The answer to 12345 + 6789 is not 42.\n\tÄpfel, naïve 中文 🙂 <s>[INST]</s>"


@dataclass(frozen=True)
class Imported:
    """What an import has made, or would make."""

    model_type: str
    num_parameters: int
    num_bytes: int
    difference: float | None  # the largest of the logits; None where nothing was written


def import_model(
    source: Path,
    destination: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
) -> Imported:
    """Make the package `destination` of the Hugging Face folder `source`, with its sizes, tokenizer and weights.

    With `dtype`, floating-point weights are converted. With `dry_run`, all is checked that needs no weights, and
    nothing is written. ModelError when something in the source is not supported, or the package would not compute the
    same; CheckpointError when the weights cannot be read, or the destination exists or cannot be written. Then nothing
    is left.
    """
    destination = destination.absolute()
    refuse_what_is_there(destination)
    model = HuggingFaceModel(source)
    tokenizer = _tokenizer(model)
    with _workplace(destination, dry_run) as work:
        package = _package(model, tokenizer, work / destination.name)
        package.write()
        classes = load_classes(package.dir)
        ours = on_meta(classes.model, classes.config)
        shapes = shapes_of(ours)
        recipes = {name: model.family.package_recipe(name) for name in shapes}
        _require_fit(model, recipes, shapes)
        require_same_computation(
            classes.model, classes.config, model.family.model_class, model.config, model.family.package_recipe
        )
        kinds = converted(kinds_made(recipes, model.kinds), dtype)
        num_bytes = sum(kind.num_bytes for kind in kinds.values())
        num_parameters = sum(kind.num_bytes // kind.dtype.itemsize for kind in kinds.values())
        if dry_run:
            return Imported(model.family.model_type, num_parameters, num_bytes, None)
        model.require_ties()
        write_shards(package.dir, kinds, max_shard_bytes, following(recipes, model.stream))
        tell_dtype(package.dir / "config.json", kinds)
        if (source / GENERATION_CONFIG).is_file():
            shutil.copy(source / GENERATION_CONFIG, package.dir / GENERATION_CONFIG)
        _require_same_tokens(tokenizer, package.dir)
        stock = on_meta(model.family.model_class, model.config)
        difference = require_equal(
            ours, lambda: open_weights(package.dir).read, stock, lambda: converting(model.reader(), dtype)
        )
        publish(package.dir, destination)
    return Imported(model.family.model_type, num_parameters, num_bytes, difference)


@contextmanager
def _workplace(destination: Path, dry_run: bool) -> Iterator[Path]:
    """A folder to work in, on the disk of `destination`; for a dry run elsewhere, and nothing stays of it."""
    if dry_run:
        with TemporaryDirectory() as folder:
            yield Path(folder)
        return
    with only_writer(destination), emptied(destination.with_name(f".{destination.name}.partial")) as work:
        yield work


def _package(model: HuggingFaceModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Package:
    """The package that the family's project makes with the sizes of `model`."""
    sizes, kept = model.family.sizes(model.config)
    project = Project(f"lib:models/{model.family.project}", args={"model_name": folder.name, "output_dir": folder})
    known = project.build("hf_config", given={"tokenizer": tokenizer})
    if unknown := [f"{key} is {value!r}" for key, value in sizes.items() if key not in known and value]:
        raise ModelError(
            f"{model.path / 'config.json'} asks for what the project models/{model.family.project} has no place for: "
            + "; ".join(unknown),
            fix="import a model without it, or compose one of the parts that do and load the weights into that",
        )
    declared = project.parameters.keys() & sizes.keys()
    project = project.replaced(
        args={key: sizes[key] for key in declared},
        set={"hf_config": kept | {key: value for key, value in sizes.items() if key not in declared}},
    )
    package: Package = project.build("package", given={"tokenizer": tokenizer})
    return package


def _require_fit(model: HuggingFaceModel, recipes: dict[str, Recipe], wanted: dict[str, tuple[int, ...]]) -> None:
    found = differences(recipes, wanted, model.kinds)
    found += [f"{name} is {kind.dtype}" for name, kind in model.kinds.items() if not kind.dtype.is_floating_point]
    if found:
        raise ModelError(
            f"the weights in {model.path} are not those of the {model.family.model_type} that its config.json tells "
            f"of:{listed(found)}",
            fix="fetch the folder anew; of a model with another head, import the causal language model, and of a "
            "quantized one what it was made of",
        )


def _tokenizer(model: HuggingFaceModel) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder, all of whose ids have a row of the embedding."""
    if not any((model.path / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{model.path} has no tokenizer", fix=f"put its files there: {', '.join(_TOKENIZER_FILES)}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"the tokenizer in {model.path} cannot be loaded: {error}", fix="fetch its files anew"
        ) from error
    if (largest := vocab_size(tokenizer) - 1) >= model.config.vocab_size:
        raise ModelError(
            f"the tokenizer in {model.path} has ids up to {largest}, and the model only {model.config.vocab_size} rows",
            fix="put the tokenizer there that the model was trained with",
        )
    return tokenizer


def _require_same_tokens(tokenizer: PreTrainedTokenizerBase, package: Path) -> None:
    """A tokenizer is saved in another form than it was read in, and that must not change what it does."""
    saved = AutoTokenizer.from_pretrained(package)
    if saved(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
        raise ModelError(
            f"once saved, the tokenizer gives other ids: this version of transformers changes a {type(tokenizer)}",
            fix="put the tokenizer.json of the same model there instead of its other tokenizer files",
        )
