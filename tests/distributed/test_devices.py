"""Devices are counted as torch would, without torch."""

from types import SimpleNamespace

import pytest

from forgather.distributed import devices

BUILDS = {"__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n": 3}
BUILDS["__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"] = 0
BUILDS["cuda = None\n"] = 0
BUILDS["cuda = '12.8'\n"] = 3


class Driver:
    """libcuda with three devices; `broken` fails at the named call."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def cuInit(self, flags):
        return 100 if self.broken == "cuInit" else 0

    def cuDeviceGetCount(self, pointer):
        pointer._obj.value = 3
        return 100 if self.broken == "cuDeviceGetCount" else 0


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Pretends that torch is a build whose version.py says this."""

    def pretend(text):
        (tmp_path / "version.py").write_text(text)
        spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(devices, "find_spec", lambda name: spec)

    return pretend


@pytest.mark.parametrize(("text", "count"), BUILDS.items())
def test_the_build_of_torch_decides_first(text, count, build, monkeypatch):
    build(text)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Driver())
    assert devices.count_cuda_devices() == count


@pytest.mark.parametrize("broken", ["cuInit", "cuDeviceGetCount"])
def test_a_driver_without_devices_counts_none(broken, build, monkeypatch):
    build("cuda = '12.8'\n")
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Driver(broken))
    assert devices.count_cuda_devices() == 0


def test_no_driver_counts_none(build, monkeypatch):
    build("cuda = '12.8'\n")
    real = devices.ctypes.CDLL
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: real("libno-such-library.so"))
    assert devices.count_cuda_devices() == 0


def test_no_torch_counts_none(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert devices.count_cuda_devices() == 0
