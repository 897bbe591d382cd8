"""A Hugging Face folder of a family that we know: its config, and its weights by the names of transformers' model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from forgather.conversion.families import FAMILIES, Family
from forgather.conversion.json_mapping import read_mapping
from forgather.conversion.safetensors_file import TensorKind
from forgather.conversion.ties import require_equal_ties
from forgather.conversion.weight_sources import HUGGING_FACE_FILES, Read, open_weights
from forgather.errors import ModelError

# Buffers that older versions of transformers saved, and newer ones compute.
_COMPUTED = re.compile(r"\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


class HuggingFaceModel:
    """The model in `folder`, of which only config.json and the headers of the weights have been read.

    ModelError where its family, or something that its config asks for, is not supported; CheckpointError where its
    weights cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        settings = _settings(folder)
        self.family = _family(folder, settings)
        self.config = _config(folder, self.family)
        reasons = self.family.unsupported(self.config)
        if "quantization_config" in settings:
            reasons.append("the weights are quantized")
        if reasons:
            raise ModelError(
                f"{folder / 'config.json'} asks for what the project models/{self.family.project} does not compute: "
                + "; ".join(reasons),
                fix="import a model without it, or compose one of the parts that do and load the weights into that",
            )
        self.model = _on_meta(folder, self.family, self.config)
        self._source = open_weights(_weights(folder))
        self._parameters = set(self.model.state_dict())
        self._stored = {self._canonical(there): there for there in self._source.kinds}
        self._names = self._canonical_names()
        self.kinds: Mapping[str, TensorKind] = {name: self._source.kinds[there] for name, there in self._names.items()}

    def reader(self) -> Read:
        """Gives weights by name, as views of the files, which it closes when it goes."""
        source = open_weights(self._source.path)
        return lambda name: source.read(self._names[name])

    def stream(self, names: Sequence[str]) -> Iterator[torch.Tensor]:
        """The weights of these names, in this order."""
        return map(self.reader(), names)

    def require_ties(self) -> None:
        """Raise ModelError where the files hold both of two tied weights and they differ."""
        require_equal_ties(self.model.all_tied_weights_keys, self._stored, self._source.read, str(self.path))

    def _canonical_names(self) -> dict[str, str]:
        """What each tensor is called in transformers' model, and in the files; a tied one by the name of its source."""
        tied = self.model.all_tied_weights_keys
        names = {}
        for name, there in self._stored.items():
            known = tied.get(name, name)
            is_alias = name in tied and known in self._stored
            if not is_alias and (known in self._parameters or not _COMPUTED.search(name)):
                names[known] = there
        return names

    def _canonical(self, there: str) -> str:
        """Files may hold the trunk alone, as those of GPT-2 do; a tied head is all that it lacks."""
        prefixed = f"{self.model.base_model_prefix}.{there}"
        return prefixed if prefixed in self._parameters or _COMPUTED.search(prefixed) else there


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        said = "has no config.json, so it is no Hugging Face model" if folder.is_dir() else "is no folder"
        raise ModelError(f"{folder} {said}", fix="name a folder that holds a Hugging Face model")
    return read_mapping(path)


def _family(folder: Path, settings: Mapping[str, Any]) -> Family:
    if "hf_model_type" in settings:
        raise ModelError(
            f"{folder} is a model package already", fix="`forgather export --as native` goes the other way"
        )
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        more = "; of gemma3, only the text model alone is" if kind == "gemma3" else ""
        raise ModelError(
            f"{folder / 'config.json'}: no project computes a model_type {kind!r}{more}",
            fix=f"import one of: {', '.join(FAMILIES)}",
        )
    return FAMILIES[kind]


def _on_meta(folder: Path, family: Family, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = family.model_class._from_config(config)
    except (ValueError, LookupError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: {family.model_class.__name__} cannot be made of it: {error!r}",
            fix="correct the value that it names",
        ) from error
    return model


def _weights(folder: Path) -> Path:
    for name in HUGGING_FACE_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder} has no weights", fix=f"put them there: one of {', '.join(HUGGING_FACE_FILES)}")


def _config(folder: Path, family: Family) -> PreTrainedConfig:
    try:
        return family.config_class.from_pretrained(folder)
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error}", fix="correct the key that it names") from error
