"""What `forgather model construct` prints of a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; one that several modules share counts once."""

    total: int
    trainable: int
    embedding: int  # of the input embedding, which is the head too where the two are tied


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count without touching a value, so that a model on the meta device will do."""
    parameters = list(model.parameters())
    get_embeddings = getattr(model, "get_input_embeddings", None)
    embeddings = get_embeddings().parameters() if get_embeddings is not None else ()
    return ParameterCount(
        total=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        embedding=sum(parameter.numel() for parameter in embeddings),
    )


def report(model: PreTrainedModel, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Configuration, tokenizer, module tree with equal layers folded, and numbers of parameters."""
    count = count_parameters(model)
    tied = " (tied to the head)" if getattr(model.config, "tie_word_embeddings", False) else ""
    first = next(model.parameters())
    return "\n".join(
        [
            _header("Configuration"),
            model.config.to_json_string().rstrip(),
            _header("Tokenizer"),
            f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens",
            *(f"  {role}: {token!r}" for role, token in tokenizer.special_tokens_map.items()),
            f"  chat template: {'yes' if tokenizer.chat_template else 'no'}",
            _header(f"Model on {first.device}, {str(first.dtype).removeprefix('torch.')}"),
            repr(model),
            _header("Parameters"),
            f"total      {_number(count.total)}",
            f"trainable  {_number(count.trainable)}",
            f"embedding  {_number(count.embedding)}{tied}",
            "",
        ]
    )


def _header(title: str) -> str:
    return f"\n{title}\n{'-' * len(title)}"


def _number(count: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit} ({count:,})"
    return str(count)
