"""Weights that a model ties, in files that may hold them more than once."""

from collections.abc import Mapping

import torch

from forgather.conversion.weight_sources import Read
from forgather.errors import ModelError


def require_equal_ties(ties: Mapping[str, str], there: Mapping[str, str], read: Read, where: str) -> None:
    """Raise ModelError where both of two tied weights are stored and they differ, so that one would be lost.

    `ties` leads from a parameter to the one that it is tied to, `there` from each stored one to what `read` calls it.
    """
    for one, other in ties.items():
        if one in there and other in there and not torch.equal(read(there[one]), read(there[other])):
            raise ModelError(
                f"{where}: config.json ties {one} to {other}, and the two weights differ",
                fix="set tie_word_embeddings to false in its config.json if both are meant",
            )
