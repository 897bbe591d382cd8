"""A model as a folder has it, for a run that begins with its weights: its shape, its code or class, its tokenizer."""

import copy
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
    PreTrainedTokenizerFast,
)

from forgather.conversion.checkpoint_model import PACKAGE, candidates
from forgather.conversion.json_mapping import read_mapping
from forgather.errors import CheckpointError, ModelError
from forgather.models.construct import load_classes
from forgather.models.initialize import InitRules
from forgather.models.parts.initializers import Normal


class ModelFolder:
    """The model in `path`: a checkpoint or a run of ours (its newest), a model package, or a Hugging Face folder.

    `dropout` replaces the probability of every dropout that its config names; null leaves what the folder says. All
    other sizes are the folder's. It is a source of models as `forgather.models.package.Package` is one.
    """

    def __init__(self, path: str | Path, dropout: float | None = None) -> None:
        self.path = Path(path)
        self.dir = description_in(self.path)
        self.dropout = dropout

    @property
    def init_rules(self) -> InitRules:
        """First values, which the weights of the folder replace."""
        if self._is_package:
            return load_classes(self.dir).init_rules
        return {".*": Normal(std=0.02)}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's; CheckpointError when it has none."""
        found = tokenizer_in(self.path)
        if found is None:
            raise CheckpointError(f"{self.dir} has no tokenizer", fix="put its tokenizer.json beside its config.json")
        return found

    def write(self, refresh: bool = False) -> Path:
        """The folder that describes the model; nothing is ever written there."""
        if refresh:
            raise ModelError(
                f"the model of {self.path} is no package that this configuration makes", fix="leave out --refresh-model"
            )
        return self.dir

    def construct(
        self, device: str = "meta", *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
    ) -> PreTrainedModel:
        """The model, without values on meta, and elsewhere with those that its classes draw."""
        options: dict[str, Any] = {"dtype": dtype or torch.get_default_dtype()}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        config = self._config
        with torch.device(device):
            if self._is_package:
                model: PreTrainedModel = load_classes(self.dir).model._from_config(config, **options)
            else:
                model = AutoModelForCausalLM.from_config(config, **options)
        return model

    @cached_property
    def _is_package(self) -> bool:
        return "AutoModelForCausalLM" in read_mapping(self.dir / "config.json").get("auto_map", {})

    @property
    def _config(self) -> PreTrainedConfig:
        config = load_classes(self.dir).config if self._is_package else AutoConfig.from_pretrained(self.dir)
        config = copy.deepcopy(config)
        if self.dropout is not None:
            names = [key for key in config.to_dict() if key.endswith(_DROPOUTS)]
            if not names and self.dropout:
                raise ModelError(
                    f"the config of {self.dir} names no dropout, and {self.dropout} is wanted", fix="dropout: null"
                )
            for name in names:
                setattr(config, name, self.dropout)
        return config


# As the configs of transformers call them (`attention_dropout`, GPT-2's `attn_pdrop`), and ours.
_DROPOUTS = ("dropout", "pdrop", "dropout_prob")


def description_in(path: Path) -> Path:
    """The folder with the config.json of the model in `path`; CheckpointError when there is none."""
    if path.is_file():
        path = path.parent
    if (path / "config.json").is_file():
        return path
    package = candidates(path)[0] / PACKAGE
    if not (package / "config.json").is_file():
        raise CheckpointError(
            f"{package.parent} has no model package, so that the model's shape is not known",
            fix=f"put the model's files (config.json, code, tokenizer) into {package}",
        )
    return package


def tokenizer_in(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights in `path`, None where there is none."""
    try:
        folder = description_in(path)
    except CheckpointError:
        return None
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    # Of a folder with code, AutoTokenizer would ask whether that may be run, and our packages need none for it.
    has_code = "auto_map" in read_mapping(folder / "config.json")
    kind = PreTrainedTokenizerFast if has_code and (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        found: PreTrainedTokenizerBase = kind.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can read: {error}", fix="put its tokenizer.json there"
        ) from error
    return found
