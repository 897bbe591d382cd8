"""Which documents of a source train and which validate, and how much of each source a mixture takes."""

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from forgather.errors import DataError

_NO_VALIDATION = "set validation_fraction to 0 and train with `main.evaluation=null`"


def split_documents(
    lengths: NDArray[np.int64], hashes: NDArray[np.uint64], fraction: float, name: str
) -> NDArray[np.bool_]:
    """True for the documents that validate: those of lowest hash, until they hold `fraction` of the tokens.

    Equal documents have equal hashes and go to the same side, so the splits share no text; where a document stands in
    the source does not matter. At least one document goes to each side. DataError when that cannot be.
    """
    if fraction == 0:
        return np.zeros(len(lengths), np.bool_)
    distinct, inverse = np.unique(hashes, return_inverse=True)
    if len(distinct) < 2:
        raise one_document_only(name)
    tokens = np.bincount(inverse, weights=lengths, minlength=len(distinct)).cumsum()
    total = int(tokens[-1])
    taken = min(int(np.searchsorted(tokens, fraction * total)) + 1, len(distinct) - 1)
    if tokens[taken - 1] > max(0.5, fraction) * total:
        raise DataError(
            f"source {name} is too small for a validation split of {fraction:g}: its {len(distinct)} distinct "
            f"documents hold {total:,} tokens, and {taken} of them would already be {tokens[taken - 1] / total:.0%}",
            fix=f"give more documents, cut them with `separator`, or {_NO_VALIDATION}",
        )
    validates: NDArray[np.bool_] = inverse < taken
    return validates


def documents_to_train(
    hashes: Mapping[str, NDArray[np.uint64]], validates: Mapping[str, NDArray[np.bool_]]
) -> dict[str, NDArray[np.bool_]]:
    """Of each source, True for the documents that train: those whose text validates in no source.

    Each source has its own edge between the sides, so a text of two sources may lie below the one and above the other.
    """
    validating = np.concatenate([hashes[name][validates[name]] for name in hashes])
    return {name: ~np.isin(hashes[name], validating) for name in hashes}


def one_document_only(name: str) -> DataError:
    """The error for a source that cannot be split."""
    return DataError(
        f"source {name} has one document only, which cannot both train and validate",
        fix=f"give more files, cut the file into documents with `separator`, or {_NO_VALIDATION}",
    )


def mixture_shares(
    available: Mapping[str, int], weights: Mapping[str, float], total: int | None
) -> tuple[dict[str, int], list[str]]:
    """How many tokens to take of each source so that the shares are the weights', and warnings about what fell short.

    With a `total`, sources that have less than their share give all they have and the others make up for it by their
    weights. Without, it is the largest total for which every share is exact.
    """
    exact = {name: Fraction(weights[name]) for name in available}
    if total is None:
        whole = sum(exact.values())
        total = int(min(available[name] * whole / weight for name, weight in exact.items()))
    warnings = []
    taken: dict[str, int] = {}
    open_names = list(available)
    while open_names:
        shares = _divide(total - sum(taken.values()), {name: exact[name] for name in open_names})
        short = [name for name in open_names if shares[name] > available[name]]
        if not short:
            taken |= shares
            break
        for name in short:
            warnings.append(
                f"source {name} has {available[name]:,} tokens, {shares[name] - available[name]:,} short of its share "
                f"of {total:,}; the other sources make up for it"
            )
            taken[name] = available[name]
            open_names.remove(name)
    missing = total - sum(taken.values())
    if missing:
        warnings.append(f"all sources together have {sum(taken.values()):,} tokens, {missing:,} fewer than asked for")
    return {name: taken[name] for name in available}, warnings


def take_tokens(
    lengths: NDArray[np.int64], hashes: NDArray[np.uint64], candidates: NDArray[np.bool_], target: int
) -> NDArray[np.int64]:
    """How many tokens to take of each document: whole ones by hash until `target`, the last one cut to meet it."""
    taken = np.zeros(len(lengths), np.int64)
    order = np.flatnonzero(candidates)
    # Not the first ones: a part of a corpus should look like all of it.
    order = order[np.argsort(hashes[order], kind="stable")]
    before = np.cumsum(lengths[order]) - lengths[order]
    taken[order] = np.clip(target - before, 0, lengths[order])
    return taken


def _divide(total: int, weights: Mapping[str, Fraction]) -> dict[str, int]:
    """Integers that sum to `total` and differ from the exact shares by less than one (largest remainders)."""
    whole = sum(weights.values())
    shares = {name: total * weight / whole for name, weight in weights.items()}
    result = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: result[name] - shares[name])
    for name in by_remainder[: total - sum(result.values())]:
        result[name] += 1
    return result
