"""How much memory a process takes at its highest, as Linux counts it, and figures from processes of their own.

    from memory import figures_of, peak_mb, reset_peak, resident_mb

A figure of memory needs a fresh process: the heap of one that has worked before is taken again, and shows nothing. So
a benchmark starts itself with the name of one of its figures, and that process prints them as its last line, in JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def resident_mb() -> float:
    """What this process has in memory now."""
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """The most it has had, since it began or since `reset_peak`."""
    return _status_mb("VmHWM")


def reset_peak() -> None:
    """Let `peak_mb` begin anew with what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def figures_of(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run this interpreter with `command`; what it printed as its last line. What it says on stderr is shown."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | dict(environment or {})
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _status_mb(field: str) -> float:
    """In units of 10^6 bytes, as tensors' sizes are given."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}: this needs Linux")
