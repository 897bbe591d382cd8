"""Which tokens a tokenizer shall have besides its own, and adding them so that no token changes its id."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from forgather.config.names import nearest
from forgather.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_LISTS = {"special_tokens": True, "regular_tokens": False}  # and whether their tokens are special
_KEYS = (*ROLES, *_LISTS)
ZERO, MEAN, COPY = "zero", "mean", "copy:"


@dataclass(frozen=True)
class Wish:
    """A token that the tokenizer shall have: in a role (`eos_token`), as a special token, or as a regular one.

    `init` is how its row in the embedding begins: `zero`, `mean` (of all rows in use), or `copy:` with the id of
    another token, or its text where that is no number. Without it: like the row of the token that had the role before,
    `zero` for the first padding, `mean` for others. With `if_missing` a role that is taken stays as it is.
    """

    token: str
    role: str | None = None
    special: bool = True
    init: str | None = None
    if_missing: bool = False

    def __post_init__(self) -> None:
        if not self.token:
            raise DataError("a token is empty", fix="write its text")
        if self.init not in (None, ZERO, MEAN) and not str(self.init).startswith(COPY):
            raise DataError(
                f"the token {self.token!r} has an unknown init {self.init!r}", fix=f"{ZERO}, {MEAN} or {COPY}TOKEN"
            )


PADDING = Wish("[PAD]", role="pad_token", if_missing=True)


@dataclass(frozen=True)
class Additions:
    """What adding has done: ids of new tokens, how their rows begin (an id: like that row), and roles that moved."""

    tokens: Mapping[str, int]
    inits: Mapping[int, str | int]
    roles: Mapping[str, tuple[int | None, int]]  # from which id to which


def read_wishes(path: Path) -> list[Wish]:
    """The wishes of a YAML file: a token for each role, and lists `special_tokens` and `regular_tokens`.

    A token is its text, or a mapping with `token`, `init` and `if_missing`. DataError for anything else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", fix="name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no YAML: {error}", fix="correct it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no mapping", fix=f"write one with any of: {', '.join(_KEYS)}")
    for key in content:
        _require_known(key, _KEYS, str(path))
    return list(_wishes(content, path))


def add(tokenizer: "PreTrainedTokenizerBase", wishes: Sequence[Wish]) -> Additions:
    """Give `tokenizer` what it lacks of `wishes`.

    A role that another token had before goes to the new one, whose row begins like that token's unless its wish says
    otherwise. DataError when a token would get an id that is taken, as in a tokenizer whose ids have gaps, or when a
    token to copy is not there.
    """
    before: dict[str, int] = tokenizer.get_vocab()
    roles: dict[str, tuple[int | None, int]] = {}
    wanted: dict[str, str | int] = {}
    for wish in wishes:
        known = wish.token in tokenizer.get_vocab()
        init: str | int | None = wish.init
        if wish.role is not None:
            old = getattr(tokenizer, wish.role)
            if old == wish.token or (old is not None and wish.if_missing):
                continue
            tokenizer.add_special_tokens({wish.role: wish.token})
            old_id = None if old is None else tokenizer.convert_tokens_to_ids(old)
            roles[wish.role] = (old_id, tokenizer.convert_tokens_to_ids(wish.token))
            init = init or tokenizer.get_vocab().get(old)  # by its id: the text of a token may be a number
        elif wish.special and wish.token not in tokenizer.all_special_tokens:
            tokenizer.add_special_tokens({"extra_special_tokens": [wish.token]}, replace_extra_special_tokens=False)
        elif not wish.special and not known:
            tokenizer.add_tokens([wish.token])
        if not known:
            wanted.setdefault(wish.token, (ZERO if wish.role == "pad_token" else MEAN) if init is None else init)
    after = tokenizer.get_vocab()
    _require_same_ids(before, after)
    there = dict(before)
    inits: dict[int, str | int] = {}
    for token, init in wanted.items():
        inits[after[token]] = _resolved(init, token, there)
        there[token] = after[token]
    for wish in wishes:
        if wish.token not in wanted and wish.init is not None:  # a mistake also where it would change no row
            _resolved(wish.init, wish.token, after)
    return Additions({token: after[token] for token in wanted}, inits, roles)


def _wishes(content: Mapping[str, Any], path: Path) -> Iterator[Wish]:
    for key, value in content.items():
        if key in _LISTS and not isinstance(value, list):
            raise DataError(f"{path}: {key} is no list", fix="write one token a line, each after a dash")
        for entry in value if key in _LISTS else [value]:
            fields = {"token": entry} if isinstance(entry, str) else entry
            if not isinstance(fields, dict) or not isinstance(fields.get("token"), str):
                raise DataError(f"{path}: {key} has {entry!r}, which is no token", fix="quote the text of the token")
            for name in fields:
                _require_known(name, ("token", "init", *(["if_missing"] if key in ROLES else [])), f"{path}: {key}")
            yield Wish(role=key if key in ROLES else None, special=_LISTS.get(key, True), **fields)


def _require_known(key: object, known: Sequence[str], where: str) -> None:
    if key not in known:
        near = nearest(str(key), known)
        raise DataError(f"{where}: unknown key {key!r}", fix=f"did you mean {near}?" if near else f"{', '.join(known)}")


def _require_same_ids(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    taken = {number: token for token, number in before.items()}
    for token, number in after.items():
        owner = taken.get(number, token) if token not in before else token
        if owner != token or before.get(token, number) != number:
            raise DataError(
                f"the token {token!r} would get the id {number}, which is that of {owner!r}: the ids have gaps",
                fix="give the tokenizer a token for each id first",
            )


def _resolved(init: str | int, token: str, ids: Mapping[str, int]) -> str | int:
    if isinstance(init, int) or not init.startswith(COPY):
        return init
    other = init.removeprefix(COPY)
    number = int(other) if other.isdecimal() else ids.get(other)
    if number is None or number not in ids.values():
        raise DataError(f"the token {token!r} shall begin like {other!r}, which is no token before it", fix="name one")
    return number
