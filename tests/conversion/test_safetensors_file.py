"""A streamed file is what the library reads, and what the disk refuses in the midst of it is told."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forgather.conversion import safetensors_file
from forgather.conversion.safetensors_file import SafetensorsFile, TensorKind

TENSORS = {f"w{number}": torch.randn(16, 8, generator=torch.Generator().manual_seed(number)) for number in range(6)}
KINDS = {name: TensorKind(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def write(path: Path) -> None:
    with SafetensorsFile(path, KINDS) as file:
        for name in file.order:
            file.write(TENSORS[name])


@pytest.fixture(autouse=True)
def _asks_the_disk_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_SYNC_BYTES", 600)


def test_the_library_reads_what_was_streamed(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("refused", [0, -1], ids=["the first", "the last"])
def test_what_the_disk_refuses_once_is_not_lost(refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells a descriptor of an error once; a sync after that succeeds."""
    calls: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(descriptor) or sync(descriptor))
    write(tmp_path / "first")
    at = range(len(calls))[refused]
    calls.clear()

    def fail_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == at + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "second")
