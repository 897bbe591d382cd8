"""What an unquoted YAML scalar means: the 1.2 core schema, and nothing that 1.1 readers took for something else."""

import math
import re

from forgather.config.tree import Plain

_NULL = frozenset(["", "~", "null", "Null", "NULL"])
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = frozenset([".nan", ".NaN", ".NAN"])

# Read as one thing here and as another by YAML 1.1, so neither reading is a safe guess.
_WORDS = {"yes": "true", "no": "false", "on": "true", "off": "false", "y": "true", "n": "false"}
_GROUPED = re.compile(
    r"[-+]?([0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|0x[0-9a-fA-F_]*_[0-9a-fA-F_]*|[0-9]+\.[0-9]*_[0-9_]*)"
)
_OTHER_BASE = re.compile(r"[-+]?0b[01_]*[01]|[-+]0x[0-9a-fA-F_]*[0-9a-fA-F]")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9_]*)?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?")


class AmbiguousScalarError(ValueError):
    """There is no safe reading. The message says what it might mean, `fix` what to write."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def read_plain(text: str) -> Plain:
    """The value of an unquoted scalar. AmbiguousScalarError where YAML versions disagree or no float reaches."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if text[0] not in "+-.0123456789":
        meant = _WORDS.get(text.lower())
        if meant is not None:
            raise AmbiguousScalarError(f"unquoted {text!r} is text or a bool", f"write {meant}, or '{text}' for text")
        return text
    if _INT.fullmatch(text):
        return int(text) if len(text) < 4000 else _finite(text)
    if _PREFIXED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return _finite(text)
    if _INFINITE.fullmatch(text):
        return float("-inf") if text[0] == "-" else float("inf")
    if text in _NAN:
        return float("nan")
    if _GROUPED.fullmatch(text):
        plain = text.replace("_", "")
        raise AmbiguousScalarError(f"unquoted {text} is text or a number", f"write {plain}, or '{text}' for text")
    if _OTHER_BASE.fullmatch(text):
        number = int(text.replace("_", ""), 0)
        raise AmbiguousScalarError(f"unquoted {text} is text or a number", f"write {number}, or '{text}' for text")
    if _SEXAGESIMAL.fullmatch(text):
        raise AmbiguousScalarError(f"unquoted {text} is text or a number to base 60", f"write '{text}' for text")
    if _DATE.fullmatch(text):
        raise AmbiguousScalarError(f"unquoted {text} is text or a date", f"write '{text}' for text")
    return text


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        shown = text if len(text) < 40 else f"{text[:40]}..."
        raise AmbiguousScalarError(
            f"{shown} is beyond the largest float, 1.8e308", "write a smaller number, .inf, or quotes around text"
        )
    return number
