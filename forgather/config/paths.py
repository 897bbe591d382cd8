"""Paths into a tree: `a.b`, `xs[0]`, `rules["a.b"]`."""

import re
from collections.abc import Iterable
from typing import NamedTuple

_STEP = re.compile(
    r"""
    (?P<dot>\.)? (?P<name>[^.\[\]\s"'{}]+)
  | \[ \s* (?P<index>-?\d+) \s* \]
  | \[ \s* (?P<quoted>"(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*') \s* \]
    """,
    re.VERBOSE,
)
_SIMPLE = re.compile(r"[^.\[\]\s\"'{}]+")


class Step(NamedTuple):
    """One step down. `is_dotted` tells `.name` from `["name"]`, which differ below an object that was given."""

    key: str | int
    is_dotted: bool = True


def parse_path(text: str) -> tuple[Step, ...]:
    """The steps of a path. Raises ValueError with what is wrong."""
    steps: list[Step] = []
    position = 0
    while position < len(text):
        match = _STEP.match(text, position)
        dotted = match is not None and match["name"] is not None
        if match is None or (dotted and bool(match["dot"]) != bool(steps)):
            raise ValueError(f"{text!r} is no path: it goes wrong at {text[position:]!r}")
        if dotted:
            steps.append(Step(match["name"]))
        elif match["index"] is not None:
            steps.append(Step(int(match["index"]), is_dotted=False))
        else:
            steps.append(Step(re.sub(r"\\(.)", r"\1", match["quoted"][1:-1]), is_dotted=False))
        position = match.end()
    if not steps or not isinstance(steps[0].key, str):
        raise ValueError(f"{text!r} is no path: it must begin with a name")
    return tuple(steps)


def format_path(keys: Iterable[str | int]) -> str:
    """The text that `parse_path` reads back."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        elif _SIMPLE.fullmatch(key):
            text += f".{key}" if text else key
        else:
            escaped = key.replace("\\", "\\\\").replace('"', '\\"')
            text += f'["{escaped}"]'
    return text
