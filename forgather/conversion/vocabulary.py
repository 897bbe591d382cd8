"""More tokens for a model and its tokenizer, in a folder that holds both: Hugging Face's, or a package with weights.

No token changes its id, no row that had a token its values, and the vocabulary never shrinks. Weights go from file to
file one by one; of what grows, one tensor is in memory.
"""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from forgather.conversion.embedding_rows import with_rows
from forgather.conversion.json_mapping import read_mapping, write_mapping
from forgather.conversion.new_folder import locked, only_writer
from forgather.conversion.package_model import is_package
from forgather.conversion.replaced_folder import is_between, replacing, restore
from forgather.conversion.safetensors_file import TensorKind
from forgather.conversion.shards import MAX_SHARD_BYTES, write_shards
from forgather.conversion.stored_names import model_names
from forgather.conversion.ties import require_equal_ties
from forgather.conversion.token_additions import ROLES, Additions, Wish, add
from forgather.conversion.weight_sources import HUGGING_FACE_WEIGHTS, open_weights
from forgather.durable import appearing
from forgather.errors import CheckpointError, DataError, ModelError
from forgather.models.construct import load_classes
from forgather.models.package import MANIFEST
from forgather.models.sources import ARCHITECTURE, INITIALIZATION
from forgather.models.vocabulary import vocab_size

_IDS = {role: f"{role}_id" for role in ROLES if role != "unk_token"}  # transformers' configs know no unknown token
Make = Callable[[PreTrainedConfig], PreTrainedModel]
_STALE = {"added_tokens.json"}  # what older versions wrote of a tokenizer, and newer ones keep in tokenizer.json


@dataclass(frozen=True)
class Extended:
    """What an extension has changed, or would."""

    additions: Additions
    num_tokens: tuple[int, int]  # before and after
    num_rows: tuple[int, int]

    @property
    def changes(self) -> bool:
        return bool(self.additions.tokens or self.additions.roles) or self.num_rows[0] != self.num_rows[1]


def extend_vocabulary(
    source: Path,
    destination: Path | None,
    wishes: Sequence[Wish],
    *,
    num_rows: int | None = None,
    multiple_of: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dry_run: bool = False,
) -> Extended:
    """Write `destination`, a copy of `source` with what its tokenizer lacks of `wishes`; None changes `source` itself.

    The embedding gets the rows that the ids need, `num_rows` where that is given, rounded up to a multiple. With
    `dry_run`, or where `source` is to change and nothing would, nothing is written. Ties hold. DataError where the
    tokenizer cannot take the tokens or rows would be lost, ModelError where the model is not understood,
    CheckpointError when weights cannot be read or the folder cannot be written; then everything is as it was.
    """
    source = source.absolute()
    if is_between(source):
        with locked(source):
            restore(source)
    _require_model(source)
    if dry_run:
        return _Job(source, wishes, num_rows, multiple_of).result
    if destination is not None:
        destination = destination.absolute()
        job = _Job(source, wishes, num_rows, multiple_of)
        with only_writer(destination), appearing(destination) as aside:
            job.write(aside, max_shard_bytes)
        return job.result
    with locked(source):  # already while it is read: what another adds meanwhile would be lost
        job = _Job(source, wishes, num_rows, multiple_of)
        if job.result.changes:
            with replacing(source, without=_replaced) as aside:
                job.write(aside, max_shard_bytes)
    return job.result


class _Job:
    """One extension: all that can be refused is refused here, before anything is written."""

    def __init__(self, folder: Path, wishes: Sequence[Wish], num_rows: int | None, multiple_of: int) -> None:
        self.folder = folder
        self.settings = read_mapping(folder / "config.json")
        self.source = open_weights(folder)
        self.make, self.config = _maker(folder, self.settings)
        self.model = _on_meta(self.make, self.config)
        self.names = model_names(self.model, self.source.kinds)
        self.tokenizer = _tokenizer(folder)
        self.in_use = [row for row in self.tokenizer.get_vocab().values() if row < self.old_rows]
        old_tokens = len(self.tokenizer.get_vocab())
        self.additions = add(self.tokenizer, wishes)
        self.num_rows = self._num_rows(num_rows, multiple_of)
        num_tokens = (old_tokens, len(self.tokenizer.get_vocab()))
        self.result = Extended(self.additions, num_tokens, (self.old_rows, self.num_rows))
        self._require_fit()

    def write(self, folder: Path, max_shard_bytes: int) -> None:
        """The whole new folder."""
        for path in self.folder.iterdir():
            if path.is_file() and path.name != MANIFEST and not _replaced(path.name):
                shutil.copy(path, folder / path.name)
        self.tokenizer.save_pretrained(folder)
        if (folder / "special_tokens_map.json").exists():
            write_mapping(folder / "special_tokens_map.json", self.tokenizer.special_tokens_map)
        write_mapping(folder / "config.json", self._new_settings())
        if generation := self._new_generation():
            write_mapping(folder / "generation_config.json", generation)
        write_shards(folder, self.kinds, max_shard_bytes, self._stream)
        written = _tokenizer(folder)
        if written.get_vocab() != self.tokenizer.get_vocab() or any(
            getattr(written, role) != getattr(self.tokenizer, role) for role in ROLES
        ):
            raise DataError(f"the tokenizer of {self.folder} does not come back as it was saved", fix="report it")

    @cached_property
    def grown(self) -> set[str]:
        """The names, in the files, of what has a row a token."""
        modules = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        ids = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
        named = self.model.named_parameters(remove_duplicate=False)
        names = {name for name, parameter in named if id(parameter) in ids}
        return {there for there, known in self.names.items() if known.name in names}

    @cached_property
    def kinds(self) -> dict[str, TensorKind]:
        """What is written: a tied weight once."""
        kinds = {}
        for name, kind in self.source.kinds.items():
            if name in self.grown:
                kind = TensorKind((self.num_rows, *kind.shape[1:]), kind.dtype)
            if self.names[name].name not in self.model.all_tied_weights_keys:
                kinds[name] = kind
        return kinds

    @property
    def old_rows(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def _num_rows(self, wanted: int | None, multiple_of: int) -> int:
        needed = max(self.old_rows, vocab_size(self.tokenizer))
        if wanted is not None and wanted < needed:
            raise DataError(
                f"{wanted} rows are too few: the model has {self.old_rows}, and the ids of the tokenizer need "
                f"{vocab_size(self.tokenizer)}; a vocabulary never shrinks",
                fix=f"ask for {needed} or more",
            )
        return -(-max(needed, wanted or 0) // multiple_of) * multiple_of

    def _require_fit(self) -> None:
        """The files have what the model has now, and what it will have is what is going to be written."""
        larger = _on_meta(self.make, self.config, vocab_size=self.num_rows).state_dict()
        stored = {known.name: there for there, known in self.names.items()}
        stored |= {there: there for there, known in self.names.items() if known.name == there}  # which counts
        for name, tensor in self.model.state_dict().items():
            there = stored.get(name)
            if there is None:
                if name not in self.model.all_tied_weights_keys:
                    raise ModelError(
                        f"{self.source.path} has no {name}", fix="bring back the config.json of these weights"
                    )
                continue
            if not self.names[there].whole:
                self._require_untouched(name, there, tensor.shape == larger[name].shape)
                continue
            if self.source.kinds[there].shape != tuple(tensor.shape):
                raise ModelError(
                    f"{there} is {list(self.source.kinds[there].shape)} in {self.source.path}, and config.json makes "
                    f"it {list(tensor.shape)}",
                    fix="bring back the config.json of these weights",
                )
            if there in self.kinds and self.kinds[there].shape != tuple(larger[name].shape):
                raise ModelError(f"{name} would grow with the vocabulary too", fix="extend a model without it")
        require_equal_ties(self.model.all_tied_weights_keys, stored, self.source.read, str(self.folder))

    def _require_untouched(self, name: str, there: str, same_shape: bool) -> None:
        """What transformers makes of several tensors cannot be compared by shape; it is copied as it is stored."""
        if there in self.grown or not same_shape:
            raise ModelError(
                f"transformers makes {name}, which has a row a token, of tensors such as {there} in {self.source.path}",
                fix="save the model with save_pretrained(..., save_original_format=False), and extend that",
            )

    def _stream(self, names: Sequence[str]) -> Iterator[torch.Tensor]:
        for name in names:
            tensor = self.source.read(name)
            grows = name in self.grown
            yield with_rows(tensor, self.num_rows, self.in_use, self.additions.inits) if grows else tensor

    def _new_settings(self) -> dict[str, Any]:
        settings = dict(self.settings)
        if self.num_rows != self.old_rows:
            settings["vocab_size"] = self.num_rows
        for role, (_, new) in self.additions.roles.items():
            if (key := _IDS.get(role)) is not None:
                old = settings.get(key)
                settings[key] = [*old, new] if isinstance(old, list) else new
        return settings

    def _new_generation(self) -> dict[str, Any]:
        """Generation ends at the old end of a text as well as at the new one."""
        path = self.folder / "generation_config.json"
        settings = read_mapping(path) if path.exists() else {}
        for role, (old, new) in self.additions.roles.items():
            key = _IDS.get(role)
            if key == "eos_token_id":
                ends = settings.get(key, self.settings.get(key, old))
                ends = ends if isinstance(ends, list) else [ends]
                ends = [*(end for end in ends if end is not None and end != new), new]
                settings[key] = ends if len(ends) > 1 else new
            elif key is not None:
                settings[key] = new
        return settings


def _require_model(folder: Path) -> None:
    if not is_package(folder):
        raise CheckpointError(
            f"{folder} holds no config.json with weights beside it",
            fix="name a Hugging Face folder or a package with weights; of a run, `forgather export` makes one",
        )


def _replaced(name: str) -> bool:
    """Whether a file must not stand beside what is written."""
    return name in _STALE or HUGGING_FACE_WEIGHTS.fullmatch(name) is not None


def _maker(folder: Path, settings: Mapping[str, Any]) -> tuple[Make, PreTrainedConfig]:
    """What makes a model of a config, and the config in `folder`. Of code that comes with a model, only ours is run."""
    if "auto_map" in settings:
        if not all((folder / f"{name}.py").exists() for name in (ARCHITECTURE, INITIALIZATION)):
            raise ModelError(
                f"{folder} brings code of its own, which is not run",
                fix="name a package of Forgather's, or a model of transformers' own classes",
            )
        classes = load_classes(folder)
        return classes.model._from_config, classes.config
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error}", fix="correct what the message names") from error
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ModelError(f"{folder / 'config.json'} has no vocab_size of its own", fix="name its text model alone")
    return AutoModelForCausalLM.from_config, config


def _on_meta(make: Make, config: PreTrainedConfig, **changes: Any) -> PreTrainedModel:
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        with torch.device("meta"):
            return make(config)
    except ValueError as error:
        raise ModelError(f"config.json: {error}", fix="name a folder of a causal language model") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no tokenizer that transformers can read: {error}", fix="put it there") from error
