"""A hook whose ranks hold different tensors: each gives its own, and reads its own on any number of ranks."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forgather.checkpoint.document import join, split
from forgather.checkpoint.merged_document import merge
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.state import TrainState
from forgather.checkpoint.store import CheckpointStore
from forgather.distributed.collectives import rank, world_size
from forgather.errors import CheckpointError
from tests.ranks import RankPool

NAMES = [f"block {number}" for number in range(5)]


class Stages:
    """Each rank has the blocks of its stage."""

    def __init__(self, fill: float) -> None:
        self.blocks = {name: torch.full((3,), fill + number) for number, name in enumerate(self.names())}
        self.said: Any = None

    def names(self) -> list[str]:
        return NAMES[rank() :: world_size()]

    def state_dict(self) -> dict[str, Any]:
        return {"said by": rank(), "of": {name: rank() for name in self.blocks}, "blocks": self.blocks}

    def load_targets(self, saved: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        assert set(saved["of"]) == set(NAMES)
        assert {path: (tuple(shape), dtype) for path, (shape, dtype) in stored.items()} == {
            f"blocks/{name}": ((3,), torch.float32) for name in NAMES
        }
        return {f"blocks/{name}": self.blocks[name] for name in self.blocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.said = state
        assert all(state["blocks"][name] is self.blocks[name] for name in self.blocks)


def state_of(hook: Stages) -> TrainState:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), {"hook": hook})


def save(folder: Path) -> None:
    hook = Stages(10.0 * rank())
    with RunFolder(folder) as run, CheckpointStore(run) as store:
        store.save(state_of(hook), 1)


def load(folder: Path) -> tuple[dict[str, list[float]], Any]:
    hook = Stages(-1.0)
    with RunFolder(folder) as run, CheckpointStore(run) as store:
        assert store.resume(state_of(hook)) is not None
    return {name: block.tolist() for name, block in hook.blocks.items()}, {
        key: list(value) if isinstance(value, dict) else value for key, value in hook.said.items()
    }


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def test_what_two_ranks_gave_is_read_by_two_and_by_one(tmp_path: Path, two_ranks: RankPool) -> None:
    two_ranks.run(save, tmp_path)
    wanted = {name: [10.0 * (number % 2) + number // 2] * 3 for number, name in enumerate(NAMES)}
    again = two_ranks.run(load, tmp_path)
    assert again[0][0] | again[1][0] == wanted
    assert set(again[0][0]).isdisjoint(again[1][0])
    for blocks, said in again:
        assert set(said["blocks"]) == set(blocks)  # each has its own tensors, and what is no tensor of all
        assert set(said["of"]) == set(NAMES)
        assert said["said by"] == 0  # where several speak, rank 0 counts
    alone, _ = load(tmp_path)
    assert alone == wanted


def test_parts_of_a_document_are_put_together_and_contradictions_of_kind_are_refused() -> None:
    assert merge([{"a": 1, "c": {"x": 1}}, {"a": 2, "b": [3], "c": {"y": 2}}]) == {
        "a": 1,
        "b": [3],
        "c": {"x": 1, "y": 2},
    }
    assert merge([{"__tensor__": "a"}, {"__tensor__": "a"}]) == {"__tensor__": "a"}
    with pytest.raises(CheckpointError, match=r"extras/hook/a is a dict on rank 1, and int on rank 0(.|\n)*'hook'"):
        merge([{"hook": {"a": 1}}, {"hook": {"a": {"x": 1}}}, {"hook": {}}])
    with pytest.raises(CheckpointError, match="extras/hook is a dict on rank 0, and tensor on rank 1"):
        merge([{"hook": {}}, {"hook": {"__tensor__": "a"}}])


@pytest.mark.parametrize(
    ("states", "whole"),
    [
        ([{}, {1: "x"}], {1: "x"}),
        ([{1: "x"}, {}], {1: "x"}),
        ([{1: "x"}, {2: "y", 1: "z"}], {1: "x", 2: "y"}),
        ([{1: {"a": 1}}, {1: {"b": {}}}, {1: {"b": {3: ()}}}], {1: {"a": 1, "b": {3: ()}}}),
        ([{1: "number"}, {"1": "text"}], {1: "number", "1": "text"}),
        ([{"__tensor__": 5}, {"a": 6}], {"__tensor__": 5, "a": 6}),
        ([{}, {}], {}),
    ],
)
def test_dicts_of_any_keys_are_put_together(states: list[Any], whole: Any) -> None:
    """What a dict looks like in JSON depends on its keys, and an empty one has none."""
    merged = merge([split({"hook": state}, "extras")[0] for state in states])
    assert join(json.loads(json.dumps(merged)), {}) == {"hook": whole}
