"""Nested states survive as JSON and tensors."""

import json
import math

import pytest
import torch

from forgather.checkpoint.document import join, split
from forgather.errors import CheckpointError


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        2**70,
        0.1,
        -math.inf,
        "text",
        [],
        {},
        (),
        [1, [2.5, ("a", None)]],
        {"a": {"b": [1]}, "c": ()},
        {1: "a", "1": "b", -5: {}},
        {"__tensor__": "a name that we use ourselves"},
    ],
)
def test_values_come_back(value: object) -> None:
    document, tensors = split(value, "x")
    assert not tensors
    again = join(json.loads(json.dumps(document, allow_nan=False)), {})
    assert again == value
    assert type(again) is type(value)


def test_nan_comes_back() -> None:
    assert math.isnan(join(split(math.nan, "x")[0], {}))


def test_tensors_are_named_by_their_path() -> None:
    value = {"a": [torch.ones(2), {"b": torch.zeros(1)}]}
    document, tensors = split(value, "extras/hook")
    assert list(tensors) == ["extras/hook/a/0", "extras/hook/a/1/b"]
    again = join(json.loads(json.dumps(document)), tensors)
    assert again["a"][0] is value["a"][0]


def test_what_json_cannot_carry_is_named() -> None:
    with pytest.raises(CheckpointError, match="the state x/a/0 holds a bytes"):
        split({"a": [b"raw"]}, "x")


@pytest.mark.parametrize(
    "value",
    [
        {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}},
        {1: torch.ones(1), "1": torch.ones(1)},
        {"a": [torch.ones(1)], "a/0": torch.ones(1)},
    ],
)
def test_two_tensors_of_one_path_are_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"both be saved as x/(.|\n)*fix: "):
        split(value, "x")
