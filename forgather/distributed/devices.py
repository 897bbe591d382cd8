"""How many CUDA devices this process may use, found without importing torch, which takes longer than most commands."""

import ctypes
import re
from importlib.util import find_spec
from pathlib import Path


def count_cuda_devices() -> int:
    """The number that `torch.cuda.device_count()` would give: 0 without a driver, or with a build of torch for CPU."""
    if not _torch_has_cuda():
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    # The driver itself honours CUDA_VISIBLE_DEVICES in all its forms, MIG slices included.
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _torch_has_cuda() -> bool:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py").read_text()
    return re.search(r"^cuda\b[^=\n]*= *['\"]", version, re.MULTILINE) is not None
