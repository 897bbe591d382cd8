"""What this process may compute on, found without importing torch, which takes longer than most commands."""

import ctypes
import os
import re
import sys
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


def count_cores() -> int:
    """The cores that this process may use, where the system can say: in a container they are fewer than there are."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _torch_has_cuda() -> bool:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py").read_text()
    return re.search(r"^cuda\b[^=\n]*= *['\"]", version, re.MULTILINE) is not None
