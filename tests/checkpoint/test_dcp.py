"""PyTorch's own loader reads our checkpoints, whatever mesh saved and whatever mesh loads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from forgather.checkpoint.dcp import Reader
from tests.checkpoint.test_round_trip import assert_equal
from tests.checkpoint.training import Run, save_at
from tests.ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def load(folder: str) -> dict[str, torch.Tensor]:
    """The weights of a run that DCP has filled, in its own flat form of names."""
    run = Run(seed=1)
    dcp.load({f"model/{name}": tensor for name, tensor in run.state.weights().items()}, storage_reader=Reader(folder))
    return {name: value for name, value in run.values().items() if name in run.state.weights()}


def weights(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values[name] for name in Run().state.weights()}


def test_saved_by_one_loaded_by_two_and_the_other_way(tmp_path: Path, two_ranks: RankPool) -> None:
    alone, _ = save_at(str(tmp_path / "one"), 2)
    folder = str(tmp_path / "one" / "checkpoints" / "step-00000002")
    for loaded in [load(folder), *two_ranks.run(load, folder)]:
        assert_equal(weights(alone), loaded)
    together, _ = two_ranks.run(save_at, str(tmp_path / "two"), 2)[0]
    assert_equal(weights(together), load(str(tmp_path / "two" / "checkpoints" / "step-00000002")))


def test_an_altered_file_is_noticed(tmp_path: Path) -> None:
    save_at(str(tmp_path / "run"), 2)
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    file = max(folder.glob("*.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = Run()
    run.step()  # so that the optimizer has its state
    tensors, _ = run.state.capture()
    with pytest.raises(CheckpointException, match="was altered where"):
        dcp.load(tensors, storage_reader=Reader(folder))
