"""How many ids a tokenizer speaks of, which is not how many tokens it has."""

from typing import TYPE_CHECKING

from forgather.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def vocab_size(tokenizer: "PreTrainedTokenizerBase", rows: int | None = None) -> int:
    """The rows of an embedding that has a place for each token: one more than the largest id, or `rows`.

    It is not `len(tokenizer)`: ids may have gaps. Raises ModelError where `rows` has no place for every token.
    """
    needed = 1 + max(tokenizer.get_vocab().values())
    if rows is None:
        return needed
    if rows < needed:
        raise ModelError(
            f"vocab_size {rows} has no row for every token: the tokenizer's ids go up to {needed - 1}",
            fix=f"vocab_size {needed} or more, or null for as many as the tokenizer has",
        )
    return rows
