"""What transformers' model calls the tensors of a folder, which may have names of an older transformers."""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass(frozen=True)
class ModelName:
    """A tensor's name in the model; `whole` says whether the one in the file is it, and not material to make it of."""

    name: str
    whole: bool


def model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, ModelName]:
    """For each name in the files what it is in `model`, as transformers itself renames and merges while it loads.

    So GPT-NeoX's `embed_out.weight` is `lm_head.weight`, each expert of Mixtral is a part of one tensor, and files may
    hold the trunk alone. A name that transformers does not know stays as it is.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    names = {}
    for there in stored:
        name, merged_by = rename_source_key(there, renamings, converters, model.base_model_prefix, state)
        names[there] = ModelName(name, merged_by is None)
    return names
