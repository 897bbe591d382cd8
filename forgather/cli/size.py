"""The number of parameters that the model of a config has; the one part of `forgather ls` that imports torch."""

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedConfig

from forgather.config.project import Project
from forgather.errors import ModelError
from forgather.models.report import count_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_KIND = ("hf_config", "tokenizer", "model", "package")


def num_parameters(project: Project) -> int | None:
    """Parameters of the model that the config composes, shared ones counted once; None if it composes none.

    The graph is built on the meta device and nothing is written. A tokenizer that would have to be trained counts with
    the `vocab_size` that it is to be trained to.
    """
    if not all(project.has(target) for target in _KIND):
        return None
    size = project.plain_arguments("tokenizer").get("vocab_size")
    given: dict[str, Any] = {"tokenizer": _stand_in(size)} if isinstance(size, int) else {}
    try:
        config = PreTrainedConfig(**project.build("hf_config", given=given))
        with torch.device("meta"):
            model = project.build("model", given={"hf_config": config})
    except (ValueError, OSError) as error:  # of a part, or of a tokenizer that is not where it should be
        raise ModelError(str(error)) from error
    model.tie_weights()
    return count_parameters(model).total


def _stand_in(size: int) -> "PreTrainedTokenizerFast":
    """A tokenizer of so many tokens, for one that is not trained yet."""
    from transformers import PreTrainedTokenizerFast

    words = {str(token_id): token_id for token_id in range(size)}
    special = {"unk_token": "0", "bos_token": "0", "eos_token": "0", "pad_token": "0"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), **special)
