"""Which initializer a parameter gets: the first rule whose pattern is found in its full name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from forgather.models.parts.initializers import Initializer


@dataclass(frozen=True)
class Assignment:
    """The outcome of rules over names: who gets what, who gets nothing, and which rules are for nobody."""

    chosen: dict[str, Initializer]
    pattern: dict[str, str]  # of the rule that was chosen
    without_rule: list[str]
    without_parameter: list[str]


def assign(rules: Mapping[str, Initializer], names: Iterable[str]) -> Assignment:
    """Choose for each name; a rule counts as used also where an earlier one won."""
    patterns = [(re.compile(pattern), pattern, initializer) for pattern, initializer in rules.items()]
    chosen: dict[str, Initializer] = {}
    found: dict[str, str] = {}
    without_rule, used = [], set[str]()
    for name in names:
        matching = [(pattern, initializer) for regex, pattern, initializer in patterns if regex.search(name)]
        used.update(pattern for pattern, _ in matching)
        if matching:
            found[name], chosen[name] = matching[0]
        else:
            without_rule.append(name)
    idle = [p for p, initializer in rules.items() if p not in used and not initializer.may_match_nothing]
    return Assignment(chosen, found, without_rule, idle)
