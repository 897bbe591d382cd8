"""Raw bytes: any rectangle of what any mesh has written."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from forgather.checkpoint import storage
from forgather.checkpoint.commit import merge
from forgather.checkpoint.layout import read_layout, write_layout
from forgather.checkpoint.part import read_part, write_part
from forgather.checkpoint.plan import held, make_plan
from forgather.checkpoint.storage import raw_bytes, read_into, read_tensor
from forgather.distributed.collectives import barrier, rank, world_size
from forgather.tensor_boxes import local_part
from tests.ranks import RankPool

SHAPES = [(), (1,), (7,), (5, 3), (4, 6, 2), (0, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
PLACEMENTS: list[list[Placement]] = [
    [Replicate(), Replicate()],
    [Shard(0), Replicate()],
    [Replicate(), Shard(1)],
    [Shard(0), Shard(1)],
    [Shard(1), Shard(0)],
]


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{shape}-{dtype}": torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
        for shape in SHAPES
        for dtype in DTYPES
    }


def write(folder: Path, state: dict[str, torch.Tensor]) -> None:
    plan = make_plan(held(state))
    data = [(item, raw_bytes(local_part(state[item.name]).contiguous())) for item in plan.items]
    write_part(folder, rank(), data, {}, {})
    barrier()
    if rank() == 0:
        parts = [read_part(folder, number) for number in range(world_size())]
        write_layout(folder, merge([part for part in parts if part is not None]))
    barrier()


def read(folder: Path, state: dict[str, torch.Tensor]) -> None:
    read_into(folder, read_layout(folder), state)


def test_all_shapes_and_dtypes(tmp_path: Path) -> None:
    state = tensors()
    write(tmp_path, state)
    loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    read(tmp_path, loaded)
    for name, tensor in state.items():
        assert torch.equal(tensor, loaded[name]), name


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    state = {"a": torch.arange(12).view(3, 4).t()}
    write(tmp_path, state)
    loaded = {"a": torch.zeros(8, 6, dtype=torch.int64)[::2, ::2]}
    read(tmp_path, loaded)
    assert torch.equal(state["a"], loaded["a"])


def test_bytes_stand_where_the_layout_says(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.arange(6.0).view(2, 3)})
    layout = read_layout(tmp_path)
    (chunk,) = layout["a"].chunks
    content = (tmp_path / chunk.file).read_bytes()[chunk.at : chunk.at + chunk.length]
    assert torch.frombuffer(bytearray(content), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


def laid_out(state: dict[str, torch.Tensor], placements: list[Placement]) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2))
    state = {name: tensor for name, tensor in state.items() if tensor.ndim >= 2}
    return {name: distribute_tensor(tensor, mesh, placements) for name, tensor in state.items()}


def save_and_load_everywhere(folder: str, staged: int) -> None:
    storage.STAGED = staged
    whole = tensors()
    for number, placements in enumerate(PLACEMENTS):
        place = Path(folder) / str(number)
        place.mkdir(exist_ok=True)
        write(place, laid_out(whole, placements))
        layout = read_layout(place)
        assert all(sum(math.prod(c.sizes) for c in t.chunks) == t.numel for t in layout.values())
        assert all(torch.equal(read_tensor(place, layout, name), whole[name]) for name in layout)
        for others in PLACEMENTS:
            loaded = laid_out({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, others)
            read(place, loaded)
            for name, tensor in loaded.items():
                assert isinstance(tensor, DTensor)
                assert torch.equal(tensor.full_tensor(), whole[name]), (name, placements, others)


@pytest.mark.parametrize("staged", [storage.STAGED, 50, 8])
def test_any_mesh_loads_what_any_mesh_saved(tmp_path: Path, four_ranks: RankPool, staged: int) -> None:
    """Rows, columns and both, over two dimensions of a mesh; what is replicated is stored once.

    What does not belong into a target as it is stored goes there in pieces: here all at once, by rows and by elements.
    """
    four_ranks.run(save_and_load_everywhere, str(tmp_path), staged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_load_needs_no_memory_of_the_size_of_a_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    stored = torch.arange(64 * 1000.0).view(64, 1000)
    write(tmp_path, {"a": stored})
    wide = torch.zeros(64, 2000, dtype=dtype)
    taken: list[int] = []
    empty = torch.empty

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        made = empty(*args, **options)
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(storage, "STAGED", 3000)
    monkeypatch.setattr(torch, "empty", noted)
    read(tmp_path, {"a": wide[:, ::2]})
    monkeypatch.undo()
    assert torch.equal(wide[:, ::2], stored.to(dtype))
    assert 0 < sum(taken) <= 2 * 3000


def test_what_goes_through_in_pieces_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a": torch.arange(40.0).view(4, 10)})
    file = tmp_path / "rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(storage, "STAGED", 16)
    with pytest.raises(storage.DamagedFileError, match="was altered where a is stored"):
        read(tmp_path, {"a": torch.zeros(4, 20)[:, ::2]})
