"""What was saved is what is loaded, bit for bit, on any number of ranks; and a resumed run is the undisturbed one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from forgather.checkpoint.layout import read_layout
from forgather.distributed.collectives import rank
from forgather.errors import CheckpointError, DistributedError
from tests.checkpoint.training import Run, load_newest, open_store, save_at
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_one_rank(tmp_path: Path) -> None:
    saved, saved_hash = save_at(str(tmp_path / "run"), 3)
    loaded, loaded_hash = load_newest(str(tmp_path / "run"))
    assert_equal(saved, loaded)
    assert saved_hash == loaded_hash


@pytest.mark.training_case(37, 38)
@pytest.mark.parametrize("tied", [True, False])
def test_stop_and_resume_is_the_undisturbed_run(tmp_path: Path, tied: bool) -> None:
    undisturbed = Run(tied=tied)
    losses = [undisturbed.step() for _ in range(6)]
    save_at(str(tmp_path / "run"), 3, tied=tied)
    _, resumed = load_newest(str(tmp_path / "run"), more_steps=3, tied=tied)
    assert resumed == undisturbed.hash()
    assert len(set(losses)) == 6


def steps_hash(steps: int) -> str:
    run = Run()
    for _ in range(steps):
        run.step()
    return run.hash()


def test_stop_and_resume_on_two_ranks(tmp_path: Path, two_ranks: RankPool) -> None:
    """Dropout differs from rank to rank, so that each rank must find its own random numbers again."""
    undisturbed = two_ranks.run(steps_hash, 6)
    two_ranks.run(save_at, str(tmp_path / "run"), 3)
    resumed = two_ranks.run(load_newest, str(tmp_path / "run"), more_steps=3)
    assert [digest for _, digest in resumed] == undisturbed
    assert undisturbed[0] != undisturbed[1]


def test_saved_on_two_loaded_on_one_and_four(tmp_path: Path, two_ranks: RankPool, four_ranks: RankPool) -> None:
    saved = two_ranks.run(save_at, str(tmp_path / "run"), 3)[0][0]
    assert_equal(saved, load_newest(str(tmp_path / "run"))[0])
    for loaded, _ in four_ranks.run(load_newest, str(tmp_path / "run")):
        assert_equal(saved, loaded)


@pytest.mark.training_case(39)
def test_saved_on_four_and_one_loaded_on_two(tmp_path: Path, two_ranks: RankPool, four_ranks: RankPool) -> None:
    on_four = four_ranks.run(save_at, str(tmp_path / "four"), 3)[0][0]
    on_one = save_at(str(tmp_path / "one"), 3)[0]
    assert_equal(on_four, two_ranks.run(load_newest, str(tmp_path / "four"))[1][0])
    assert_equal(on_one, two_ranks.run(load_newest, str(tmp_path / "one"))[1][0])


def random_after_load(folder: str) -> float:
    load_newest(folder)
    return torch.rand(1).item()


def test_other_ranks_start_new_streams_that_are_the_same_each_time(tmp_path: Path, four_ranks: RankPool) -> None:
    save_at(str(tmp_path / "run"), 1)
    first = four_ranks.run(random_after_load, str(tmp_path / "run"))
    assert first == four_ranks.run(random_after_load, str(tmp_path / "run"))
    assert len(set(first)) == 4


PLACES = ["model/model.layers.0.mlp.up_proj.weight", "optimizer/model.norm.weight/exp_avg", "random/1"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_load_all_of_the_older_one_when_one_finds_damage_as_it_reads(
    tmp_path: Path, two_ranks: RankPool, four_ranks: RankPool, place: str, ranks: int
) -> None:
    """Also where no rank reads the piece whole, as on more ranks, or at all, as another number's random numbers."""
    values, _ = two_ranks.run(save_at, str(tmp_path / "run"), 1)[0]
    two_ranks.run(save_at, str(tmp_path / "run"), 2)
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    chunk = next(stored.chunks[-1] for name, stored in read_layout(newest).items() if name.startswith(place))
    with (newest / chunk.file).open("r+b") as file:
        file.seek(chunk.at + chunk.length // 2)
        altered = bytes([file.read(1)[0] ^ 1])
        file.seek(chunk.at + chunk.length // 2)
        file.write(altered)
    folder = str(tmp_path / "run")
    loaded = {1: lambda: [load_newest(folder)], 2: lambda: two_ranks.run(load_newest, folder)}
    for there, _ in loaded.get(ranks, lambda: four_ranks.run(load_newest, folder))():
        assert_equal(values, there)
    said = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert f"step-00000002 is damaged and not used: {chunk.file} was altered where {place}" in said


def newest_step(folder: str) -> int:
    store = open_store(Path(folder))
    try:
        checkpoint = store.resume(Run().state)
        return 0 if checkpoint is None else checkpoint.step
    finally:
        store.run.close()


def test_all_ranks_take_the_same_checkpoint_when_one_sees_damage_at_once(tmp_path: Path, two_ranks: RankPool) -> None:
    for step in (1, 2):
        two_ranks.run(save_at, str(tmp_path / "run"), step)
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert two_ranks.run(newest_step, str(tmp_path / "run")) == [1, 1]
    assert "state.json" in (tmp_path / "run" / "logs" / "run.log").read_text()


def failing_save(folder: str, asynchronous: bool) -> str:
    run = Run()
    store = open_store(Path(folder), asynchronous=asynchronous)
    store.save(run.state, 1)
    if rank() == 1:
        # A folder where rank 1's file belongs, made while the save is under way.
        capture = run.state.capture

        def capture_and_block() -> object:
            (store.run.checkpoints / ".step-00000002.partial" / "rank-00001.bin").mkdir(parents=True)
            return capture()

        run.state.capture = capture_and_block  # type: ignore[method-assign, assignment]
    try:
        store.save(run.state, 2)
        store.finish()
    except CheckpointError as error:
        return str(error)
    finally:
        store.close()
        store.run.close()
    return "saved"


def refused_state(folder: str) -> str:
    run = Run()
    store = open_store(Path(folder))

    def refuse() -> dict[str, object]:
        raise ValueError("the hook has nothing to give")

    if rank() == 1:
        run.position.state_dict = refuse  # type: ignore[method-assign]
    try:
        store.save(run.state, 1)
    except (ValueError, DistributedError) as error:
        return str(error)
    finally:
        store.run.close()
    return "saved"


def test_a_state_that_one_rank_cannot_give_fails_on_all_at_once(tmp_path: Path) -> None:
    with RankPool(2, timeout_s=20) as pool:
        messages = pool.run(refused_state, str(tmp_path / "run"))
    assert messages == ["rank 1 failed (the hook has nothing to give)", "the hook has nothing to give"]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def refused_load(folder: str) -> tuple[str, bool]:
    run = Run(seed=99)
    before = run.values()
    store = open_store(Path(folder))

    def refuse() -> dict[str, object]:
        raise ValueError("the hook has no room")

    if rank() == 1:
        run.position.state_dict = refuse  # type: ignore[method-assign]
    try:
        store.resume(run.state)
    except (ValueError, DistributedError) as error:
        after = run.values()
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    finally:
        store.run.close()
    return "loaded", False


def test_a_state_that_one_rank_has_no_room_for_fails_on_all_before_anything_is_read(tmp_path: Path) -> None:
    with RankPool(2, timeout_s=20) as pool:
        pool.run(save_at, str(tmp_path / "run"), 1)
        answers = pool.run(refused_load, str(tmp_path / "run"))
    assert answers == [("rank 1 failed (the hook has no room)", True), ("the hook has no room", True)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_when_one_rank_fails_all_say_so_and_nothing_appears(
    tmp_path: Path, two_ranks: RankPool, asynchronous: bool
) -> None:
    messages = two_ranks.run(failing_save, str(tmp_path / "run"), asynchronous)
    assert all("Is a directory" in message and "step-00000002" in message for message in messages), messages
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
