"""Which name was meant: the nearest known one, for errors and for typos that would pass in silence."""

import keyword
from collections.abc import Iterable

EXPRESSION_FUNCTIONS = (
    "min max abs round int float str bool len ceil floor sqrt log2 env path join".split()  # noqa: SIM905
)
RESERVED = frozenset(["project", "config", "env", "args", "extends", "description", *EXPRESSION_FUNCTIONS])
EXPRESSION_WORDS = frozenset(["null", "true", "false"])


def distance(a: str, b: str, limit: int | None = None) -> int:
    """Edits that turn one into the other: insert, delete, replace, or swap two neighbours.

    More than `limit` are not counted to the end: any number above it may come out.
    """
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        last, before, row = before, row, [i]
        for j, right in enumerate(b, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
        if limit is not None and min(row) > limit:
            return limit + 1
    return row[-1]


def is_near(a: str, b: str) -> bool:
    """Close enough that one is likely the other misspelt; names that differ in their number alone are not."""
    if a.strip("0123456789") == b.strip("0123456789"):
        return False
    limit = max(1, min(len(a), len(b)) // 4)
    if abs(len(a) - len(b)) > limit or limit >= min(len(a), len(b)):  # any letter is one edit from any other
        return False
    a, b = a.lower(), b.lower()
    # An edit changes at most one letter on either side. This costs a hundredth of counting the edits.
    return len(set(a) ^ set(b)) <= 2 * limit and distance(a, b, limit) <= limit


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was most likely meant, or None when nothing is like it."""
    candidates = sorted(set(known))
    # Generous here: a wrong guess costs a reader a second, a missing one a search.
    limit = max(2, len(name) // 3)
    ranked = sorted((distance(name.lower(), each.lower()), each) for each in candidates)
    if ranked and ranked[0][0] <= min(limit, max(len(name), len(ranked[0][1])) - 1):
        return ranked[0][1]
    for each in candidates:
        if _initials(name) == each.lower() or _initials(each) == name.lower():
            return each  # learning_rate for lr
    contained = [each for each in candidates if len(name) > 2 and (name in each or (each in name and len(each) > 2))]
    return min(contained, key=len, default=None)


def did_you_mean(name: str, known: Iterable[str], *, what: str = "known") -> str:
    """The next action for an unknown name: the nearest one, or all there are."""
    known = list(known)
    guess = nearest(name, known)
    if guess is not None:
        return f"did you mean {guess!r}?"
    if not known:
        return "there are none here"
    shown = ", ".join(sorted(known)[:12])
    return f"{what}: {shown}" + (", ..." if len(known) > 12 else "")


def why_no_name(text: str) -> str | None:
    """Why `text` cannot name a target or parameter, or None when it can."""
    if not text.isidentifier() or not text.isascii():
        return "is no identifier (letters, digits and _, not a digit first)"
    if text in RESERVED or text in EXPRESSION_WORDS:
        return "is a reserved name"
    if keyword.iskeyword(text):
        return "is a word of Python"
    return None


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.lower().split("_") if word)
