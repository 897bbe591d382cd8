"""Damage is named by file, the next older whole checkpoint is used, and nothing mixed is ever loaded."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from forgather.checkpoint import storage
from forgather.checkpoint.keep import Keep
from forgather.checkpoint.manifest import Manifest
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.storage import read_all
from forgather.checkpoint.store import CheckpointStore
from forgather.distributed.collectives import rank
from forgather.errors import CheckpointError, ForgatherError
from tests.checkpoint.training import Run, save_at
from tests.ranks import RankPool


def truncate(file: Path, older: Path) -> None:
    file.write_bytes(file.read_bytes()[: -len(file.read_bytes()) // 10])


def flip_a_byte(file: Path, older: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swap_in_an_older_one(file: Path, older: Path) -> None:
    shutil.copy(older, file)


def delete(file: Path, older: Path) -> None:
    file.unlink()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    with RunFolder(tmp_path / "run") as folder:
        folder.describe("config.yaml", "a: 1\n")
        yield CheckpointStore(folder, Keep(last=3), asynchronous=False)


def save_steps(store: CheckpointStore, *steps: int) -> dict[int, dict[str, torch.Tensor]]:
    """Train to each of `steps` and save; the values there."""
    run = Run()
    values = {}
    for step in range(1, max(steps) + 1):
        run.step()
        if step in steps:
            store.run.describe("config.yaml", f"a: {step}\n")
            store.save(run.state, step)
            values[step] = run.values()
    return values


@pytest.mark.training_case(22, 28)
@pytest.mark.parametrize("name", ["rank-00000.bin", "tensors.json", "state.json", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_byte, swap_in_an_older_one, delete])
def test_the_file_is_named_and_the_older_checkpoint_is_loaded(
    store: CheckpointStore, capsys: pytest.CaptureFixture[str], name: str, damage
) -> None:
    values = save_steps(store, 1, 2)
    newest = store.run.checkpoints / "step-00000002"
    if (
        damage is swap_in_an_older_one
        and (newest / name).read_bytes() == (newest.with_name("step-00000001") / name).read_bytes()
    ):
        pytest.skip("the two steps have the same file")
    damage(newest / name, newest.with_name("step-00000001") / name)
    run = Run(seed=7)
    checkpoint = store.resume(run.state)
    said = capsys.readouterr().err
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert str(newest) in said
    assert name in said
    if damage is truncate and name != "manifest.json":
        assert "bytes instead of" in said  # seen without reading the file
    assert f"going on from {newest.with_name('step-00000001')}" in said
    log = (store.run.logs / "run.log").read_text()
    assert said in "".join(line.split(" ", 1)[1] for line in log.splitlines(keepends=True))
    assert all(torch.equal(value, values[1][name]) for name, value in run.values().items())


def test_a_folder_that_is_gone_is_one_line_however_many_files_it_had(store: CheckpointStore, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for name in "abc":
        (package / name).write_text(name)
    store.run.describe("package", package)
    save_steps(store, 1)
    folder = store.run.checkpoints / "step-00000001"
    manifest = Manifest.read(folder)
    (folder / "package" / "a").unlink()
    assert manifest.damaged_sizes(folder) == ["package/a: missing"]
    shutil.rmtree(folder / "package")
    assert manifest.damaged_sizes(folder) == ["package/: missing, with its 3 files"]


def test_an_altered_manifest_is_noticed_although_all_files_are_whole(store: CheckpointStore) -> None:
    save_steps(store, 1, 2)
    manifest = store.run.checkpoints / "step-00000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"world_size": 1', '"world_size": 2'))
    checkpoint = store.resume(Run(seed=7).state)
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_a_renamed_checkpoint_is_not_taken_for_a_newer_one(store: CheckpointStore) -> None:
    save_steps(store, 1, 2)
    folder = store.run.checkpoints / "step-00000001"
    folder.rename(folder.with_name("step-00000009"))
    checkpoint = store.resume(Run(seed=7).state)
    assert checkpoint is not None
    assert checkpoint.step == 2


@pytest.mark.training_case(23)
def test_the_newest_is_the_highest_step_whatever_was_touched_last(store: CheckpointStore) -> None:
    save_steps(store, 1, 2)
    (store.run.checkpoints / "step-00000001" / "config.yaml").touch()
    (store.run.checkpoints / "step-00000001").touch()
    checkpoint = store.resume(Run(seed=7).state)
    assert checkpoint is not None
    assert checkpoint.step == 2


@pytest.mark.training_case(24)
def test_when_all_are_damaged_nothing_starts_anew_by_accident(store: CheckpointStore) -> None:
    save_steps(store, 1, 2)
    for folder in store.run.checkpoints.iterdir():
        (folder / "rank-00000.bin").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        store.resume(Run(seed=7).state)


def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(store: CheckpointStore) -> None:
    save_steps(store, 1, 2)
    newest = store.run.checkpoints / "step-00000002"
    flip_a_byte(newest / "rank-00000.bin", newest)
    run = Run(seed=7)
    store.resume(run.state)
    run.step()
    store.save(run.state, 2)
    again = CheckpointStore(store.run).resume(Run().state)
    assert again is not None
    assert again.step == 2
    assert (store.run.checkpoints / "step-00000002.damaged").is_dir()


@contextmanager
def refusing(name: str, number: int) -> Iterator[None]:
    """The system refuses to open files of this name."""
    opens = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return opens(path, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        yield


FILES = ["manifest.json", "tensors.json", "state.json", "config.yaml", "rank-00000.bin"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_now_is_not_taken_for_damage(store: CheckpointStore, name: str, number: int) -> None:
    save_steps(store, 1, 2)
    with (
        refusing(name, number),
        pytest.raises(CheckpointError, match=rf"{name} cannot be read now: .*; nothing says that it is damaged"),
    ):
        store.resume(Run(seed=7).state)
    checkpoint = store.resume(Run(seed=7).state)
    assert checkpoint is not None
    assert checkpoint.step == 2


@pytest.mark.parametrize("name", FILES)
def test_a_disk_that_has_lost_a_file_is_damage(store: CheckpointStore, name: str) -> None:
    save_steps(store, 1, 2)
    flip_a_byte(store.run.checkpoints / "step-00000001" / "manifest.json", store.run.checkpoints)
    with refusing(name, errno.EIO), pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        store.resume(Run(seed=7).state)


def test_a_size_that_is_not_told_now_is_no_damage(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(store, 1)
    folder = store.run.checkpoints / "step-00000001"
    manifest = Manifest.read(folder)

    def refuse(path: Path) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(CheckpointError, match="cannot be read now: Stale file handle"):
        manifest.damaged_sizes(folder)


def test_a_checkpoint_of_another_version_is_not_passed_over(store: CheckpointStore) -> None:
    save_steps(store, 1, 2)
    manifest = store.run.checkpoints / "step-00000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match=r"has format 2(.|\n)*fix: use the version that wrote it"):
        store.resume(Run(seed=7).state)
    assert sorted(path.name for path in store.run.checkpoints.iterdir()) == ["step-00000001", "step-00000002"]


def resume_while(folder: str, name: str, refusing_rank: int) -> str:
    with RunFolder(Path(folder)) as run, CheckpointStore(run, asynchronous=False) as store:
        number = errno.EACCES if rank() == refusing_rank else errno.EIO
        with refusing(name if rank() == refusing_rank else "none", number):
            try:
                store.resume(Run(seed=7).state)
            except ForgatherError as error:
                return error.message
    return "resumed"


@pytest.mark.parametrize(("name", "refusing_rank"), [("manifest.json", 0), ("state.json", 1), ("rank-00001.bin", 1)])
def test_what_one_rank_cannot_read_stops_all(tmp_path: Path, name: str, refusing_rank: int) -> None:
    with RankPool(2) as pool:
        pool.run(save_at, str(tmp_path), 1)
        for said in pool.run(resume_while, str(tmp_path), name, refusing_rank):
            assert f"{name} cannot be read now: Permission denied" in said
        assert pool.run(resume_while, str(tmp_path), name, -1) == ["resumed"] * 2


def test_nothing_but_tensors_is_taken_from_a_checkpoint_that_turns_out_damaged(store: CheckpointStore) -> None:
    save_steps(store, 2)
    flip_a_byte(store.run.checkpoints / "step-00000002" / "rank-00000.bin", store.run.checkpoints)
    run = Run(seed=7)
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="every checkpoint in"):
        store.resume(run.state)
    assert run.position.consumed == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_every_byte_is_read_once(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(store, 1, 2)
    read = 0

    def counted(descriptor: int, data: memoryview, at: int) -> int:
        nonlocal read
        read += data.nbytes
        return read_all(descriptor, data, at)

    monkeypatch.setattr(storage, "read_all", counted)
    checkpoint = store.resume(Run(seed=7).state)
    assert checkpoint is not None
    chunks = [chunk for stored in checkpoint.layout.values() for chunk in stored.chunks]
    assert read == sum(chunk.length for chunk in chunks)
