"""An exported folder is the checkpoint's model, for programs that know transformers only."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from forgather.checkpoint.folder import remove
from forgather.checkpoint.run_folder import RunFolder
from forgather.checkpoint.store import CheckpointStore
from forgather.conversion import export as module
from forgather.conversion.checkpoint_model import CheckpointModel
from forgather.conversion.export import export
from forgather.conversion.safetensors_file import TensorKind
from forgather.conversion.shards import shards_of, tell_dtype
from forgather.errors import CheckpointError
from tests.checkpoint.training import Run
from tests.ranks import RankPool


def save_run(folder: str, *, num_steps: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    """A run's folder whose checkpoints carry the model's package; returns the whole weights of the last."""
    run = Run(**options)
    package = Path(folder).parent / "package"
    package.mkdir(exist_ok=True)
    run.model.config.dtype = torch.float32
    run.model.config.save_pretrained(package)
    run.model.generation_config.save_pretrained(package)
    with RunFolder(Path(folder)) as opened:
        opened.describe("package", package)
        store = CheckpointStore(opened, asynchronous=False)
        for step in range(1, num_steps + 1):
            run.step()
            store.save(run.state, step)
    return {name: tensor for name, tensor in run.values().items() if "/" not in name}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
def test_transformers_loads_the_very_weights(tmp_path: Path, tied: bool, max_shard_bytes: int) -> None:
    weights = save_run(str(tmp_path / "run"), tied=tied)
    folder = export(tmp_path / "run", tmp_path / "out", max_shard_bytes=max_shard_bytes)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    loaded = model.state_dict()
    assert ("lm_head.weight" in weights) is not tied
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight), name
    assert torch.equal(loaded["lm_head.weight"], weights["model.embed_tokens.weight" if tied else "lm_head.weight"])
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (max_shard_bytes == 10**9)
    assert (folder / "model.safetensors.index.json").exists() == (len(files) > 1)


def test_index_and_shards_agree(tmp_path: Path) -> None:
    weights = save_run(str(tmp_path / "run"))
    folder = export(tmp_path / "run", tmp_path / "out", max_shard_bytes=4000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    for file in set(index["weight_map"].values()):
        with safe_open(folder / file, framework="pt") as shard:
            assert set(shard.keys()) == {name for name, place in index["weight_map"].items() if place == file}
            assert shard.metadata() == {"format": "pt"}
            sizes = [weights[name].nbytes for name in shard.keys()]  # noqa: SIM118 - a safe_open is no dict
            assert sum(sizes) <= 4000 or len(sizes) == 1


def test_sharded_checkpoint_exports_as_the_whole_model(tmp_path: Path) -> None:
    with RankPool(2) as pool:
        weights = pool.run(save_run, str(tmp_path / "run"))[0]
    folder = export(tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_dtype_converts_and_is_what_the_folder_loads_in(tmp_path: Path) -> None:
    weights = save_run(str(tmp_path / "run"))
    folder = export(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(model.state_dict()[name], weight.bfloat16()) for name, weight in weights.items())


def flip_a_byte(checkpoint: Path, *, at: float) -> None:
    """Of the tensors' file, where `at` is the part of it that stands before: weights come first."""
    file = checkpoint / "rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 1
    file.write_bytes(content)


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path: Path) -> None:
    save_run(str(tmp_path / "run"))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already there"):
        export(tmp_path / "run", tmp_path / "out")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    flip_a_byte(checkpoint, at=1 / 8)
    with pytest.raises(CheckpointError, match=r"rank-00000\.bin was altered where model/(.|\n)*fix: export another"):
        export(checkpoint, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged(.|\n)*fix: bring back"):
        export(tmp_path / "run", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "package", "run"]


def test_a_run_without_checkpoints_says_why(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="it has saved none yet"):
        export(tmp_path / "run", tmp_path / "out")
    (checkpoints / "step-00000001.damaged").mkdir()
    with pytest.raises(
        CheckpointError, match=r"all its checkpoints are damaged, and set aside: step-00000001\.damaged"
    ):
        export(tmp_path / "run", tmp_path / "out")


def test_of_a_run_the_newest_whole_checkpoint_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_run(str(tmp_path / "run"), num_steps=2)
    first, second = (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    flip_a_byte(second, at=1 / 8)
    loaded = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", tmp_path / "out")).state_dict()
    assert not all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    older = AutoModelForCausalLM.from_pretrained(export(first, tmp_path / "older")).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in older.items())
    said = capsys.readouterr().err
    assert f"{second} is damaged: rank-00000.bin was altered" in said
    assert f"warning: exported {first}, the newest that is whole" in said


def test_a_renamed_checkpoint_is_not_taken_for_a_newer_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(str(tmp_path / "run"), num_steps=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    renamed = (checkpoints / "step-00000001").rename(checkpoints / "step-00000009")
    export(tmp_path / "run", tmp_path / "out")
    assert "step-00000009 is damaged: manifest.json: it is of step-00000001" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="it is of step-00000001"):
        export(renamed, tmp_path / "other")


def test_of_two_exports_to_one_folder_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(str(tmp_path / "run"))
    write_shards = module.write_shards
    refused: list[CheckpointError] = []

    def meanwhile(*arguments: Any) -> None:
        with pytest.raises(CheckpointError) as raised:
            export(tmp_path / "run", tmp_path / "out")
        refused.append(raised.value)
        write_shards(*arguments)

    monkeypatch.setattr(module, "write_shards", meanwhile)
    export(tmp_path / "run", tmp_path / "out")
    assert "another process is writing" in refused[0].message
    assert refused[0].fix
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "package", "run"]


@pytest.mark.parametrize("moment", ["files", "stream"])
def test_a_checkpoint_that_its_run_removes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save_run(str(tmp_path / "run"))
    original = getattr(CheckpointModel, moment)

    def after_removal(model: CheckpointModel, *arguments: Any) -> Any:
        remove(model.path)
        return original(model, *arguments)

    monkeypatch.setattr(CheckpointModel, moment, after_removal)
    with pytest.raises(CheckpointError, match=r"was removed while it was exported(.|\n)*fix: export .*run, which has"):
        export(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package", "run"]


def test_a_model_of_integers_has_no_dtype_to_tell(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    tell_dtype(tmp_path / "config.json", {"table": TensorKind((2,), torch.int64)})
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": "float32"}


def test_a_folder_that_is_no_run_names_the_runs_in_it(tmp_path: Path) -> None:
    (tmp_path / "runs" / "default" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError) as raised:
        export(tmp_path, tmp_path / "out")
    assert "runs/default" in str(raised.value)


def test_a_checkpoint_without_package_is_refused(tmp_path: Path) -> None:
    run = Run()
    with RunFolder(tmp_path / "run") as opened:
        CheckpointStore(opened, asynchronous=False).save(run.state, 1)
    with pytest.raises(CheckpointError, match="no model package"):
        export(tmp_path / "run", tmp_path / "out")


def test_shards_follow_the_model_and_are_full() -> None:
    names = [f"layers.{number}.weight" for number in range(12)]
    kinds = {name: TensorKind((10,), torch.float32) for name in names} | {"large": TensorKind((1000,), torch.float32)}
    shards = shards_of(kinds, 100)
    assert [name for shard in shards for name in shard] == ["large", *names]
    assert [len(shard) for shard in shards] == [1, 2, 2, 2, 2, 2, 2]


_MEASURE = """
import re, sys
from pathlib import Path
import torch
import torch.distributed.checkpoint  # what the export imports costs memory, too, and is not the question
from forgather.conversion.export import export
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
export(Path(sys.argv[1]) / "small", Path(sys.argv[1]) / "warm")
Path("/proc/self/clear_refs").write_text("5")
before = peak()
export(Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "out", max_shard_bytes=int(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.soak  # processes of their own, measured
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from Linux's /proc")
def test_memory_is_a_shard_not_the_model(tmp_path: Path) -> None:
    """Peak over idle at most 1.1 shards and the largest tensor, in a process of its own; the model has four shards."""
    save_run(str(tmp_path / "small"))
    weights = save_run(str(tmp_path / "run"), hidden=1024)
    total = sum(weight.nbytes for weight in weights.values())
    shard = total // 4
    process = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), str(shard)], capture_output=True, text=True, check=True
    )
    grown = int(process.stdout)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 4
    assert grown <= 1.1 * shard + max(weight.nbytes for weight in weights.values())
