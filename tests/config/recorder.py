"""Constructors that write down what they made and from what, so that two ways of building can be compared."""

from collections.abc import Callable
from typing import Any

LOG: list[Any] = []


class Thing:
    """An object that remembers its arguments. `size` is an attribute that no configuration writes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.number = len(LOG)
        LOG.append(("Thing", summary(args), summary(kwargs)))

    @property
    def size(self) -> int:
        return len(self.args) + len(self.kwargs)

    class Inner:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.args, self.kwargs, self.number = args, kwargs, len(LOG)
            LOG.append(("Inner", summary(args), summary(kwargs)))


class Handed(Thing):
    """What tests give for a target: it has the attributes that references read below it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.k0, self.k1, self.k2 = 10, [11], "twelve"


class Mutating(Thing):
    """A constructor that changes what it is given: order and sharing of containers become visible."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for each in (*args, *kwargs.values()):
            if isinstance(each, list):
                each.append(self.number)


def nothing(*args: Any, **kwargs: Any) -> None:
    LOG.append(("nothing", summary(args), summary(kwargs)))


def call_twice(*functions: Callable[..., Any]) -> list[Any]:
    """Calls each function that it is given twice."""
    LOG.append("call_twice")
    return [call(each) if callable(each) else each for each in (*functions, *functions)]


def call(function: Callable[..., Any]) -> Any:
    """Calls with as many whole numbers as the function takes."""
    for count in range(4):
        try:
            return function(*range(1, count + 1))
        except TypeError as error:
            if "argument" not in str(error):
                raise
    raise AssertionError(f"{function} takes no number of arguments up to 3")


def summary(value: Any) -> Any:
    """Arguments as comparable data; objects by the number of their construction."""
    if isinstance(value, Thing | Thing.Inner):
        return f"{type(value).__name__} {value.number}"
    if isinstance(value, dict):
        return {key: summary(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(summary(item) for item in value)
    return "function" if callable(value) and not isinstance(value, type) else value


def picture(value: Any, seen: dict[int, int] | None = None, keep: list[Any] | None = None) -> Any:
    """A result as comparable data, with which parts are one object; functions are called and their results drawn."""
    seen = {} if seen is None else seen
    keep = [] if keep is None else keep  # ids are only unique among the living
    if isinstance(value, list | dict | Thing | Thing.Inner) or (callable(value) and not isinstance(value, type)):
        if id(value) in seen:
            return ("same as", seen[id(value)])
        seen[id(value)] = len(seen)
        keep.append(value)
    if isinstance(value, Thing | Thing.Inner):
        return (type(value).__name__, value.number, picture(value.args, seen, keep), picture(value.kwargs, seen, keep))
    if isinstance(value, dict):
        return {key: picture(item, seen, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (type(value).__name__, [picture(item, seen, keep) for item in value])
    if callable(value) and not isinstance(value, type):
        return ("function", picture(call(value), seen, keep))
    return value
