"""What is wrong with a configuration: place, message, next action; many are told at once.

Code that finds one problem raises `problem(...)`; code that can go on past it catches `Problems` and collects. Both
end as one `ConfigError` that lists every place.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from forgather.config.tree import Place
from forgather.errors import ConfigError


class Problem(NamedTuple):
    """One thing to mend."""

    place: Place | None
    message: str
    fix: str | None = None
    lacks_argument: bool = False  # nothing is wrong with the config: a required parameter has no value yet

    def __str__(self) -> str:
        text = f"{self.place}: {self.message}" if self.place else self.message
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class Problems(ConfigError):  # noqa: N818  (it is several)
    """One or more problems, in the order they were found, each told once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(dict.fromkeys(problems))
        assert self.problems, "an error needs something wrong"
        if len(self.problems) == 1:
            only = self.problems[0]
            super().__init__(str(only._replace(fix=None)), fix=only.fix)
        else:
            lines = "\n".join(str(each) for each in self.problems)
            super().__init__(f"{len(self.problems)} problems in the configuration\n{lines}")

    def __reduce__(self) -> tuple[object, ...]:
        return (Problems, (self.problems,))


def problem(place: Place | None, message: str, *, fix: str | None = None) -> Problems:
    """The error to raise for one problem."""
    return Problems([Problem(place, message, fix)])


def too_deep(place: Place) -> Problems:
    """The error for objects inside of objects, or references to references, by the hundreds."""
    message = "what is built here is too deep: hundreds of objects or references, one inside another"
    return problem(place, message, fix="let one object take a list of the others, or build them in a loop of its own")


class Collector:
    """Gathers problems so that work can go on to the next one."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, place: Place | None, message: str, *, fix: str | None = None) -> None:
        self.found.append(Problem(place, message, fix))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Problems raised inside are kept, and the block is left."""
        try:
            yield
        except Problems as error:
            self.found.extend(error.problems)

    def raise_any(self) -> None:
        if self.found:
            raise Problems(self.found)
