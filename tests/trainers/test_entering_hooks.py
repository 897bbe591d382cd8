"""Hooks around a run: what was entered is left, also when a run does not even begin."""

from types import TracebackType

import pytest

from forgather.trainers.events import Hooks


class Around:
    """Remembers being entered and left."""

    def __init__(self, objection: str | None = None) -> None:
        self.objection = objection
        self.heard: list[object] = []

    def __enter__(self) -> None:
        if self.objection is not None:
            raise ValueError(self.objection)
        self.heard.append("entered")

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.heard.append(kind)


def test_hooks_that_were_entered_are_left_when_a_later_one_cannot_be():
    hooks = {"a": Around(), "b": Around(), "c": Around("no server"), "d": Around()}
    with pytest.raises(ValueError, match="no server"), Hooks(hooks):
        pytest.fail("a run has begun")
    assert [hook.heard for hook in hooks.values()] == [["entered", ValueError]] * 2 + [[], []]


def test_hooks_are_left_once_after_a_run():
    around = Around()
    with Hooks({"around": around}):
        assert around.heard == ["entered"]
    assert around.heard == ["entered", None]
