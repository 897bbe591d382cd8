"""How many ids a tokenizer speaks of, which is not how many tokens it has."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def vocab_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the largest id: the rows of an embedding that has a place for each token.

    It is not `len(tokenizer)`: ids may have gaps.
    """
    return 1 + max(tokenizer.get_vocab().values())
