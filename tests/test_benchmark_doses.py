"""Every benchmark that has a dose runs with it: what they time drifts, and a benchmark that broke says nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WITH_DOSE = sorted(path.name for path in BENCHMARKS.glob("*.py") if '"--dose"' in path.read_text())


@pytest.mark.soak
@pytest.mark.parametrize("name", WITH_DOSE)
def test_a_dose_of_each_benchmark_runs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), "--dose"], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr  # 1: a bar of time was missed, which a busy machine may do
    assert "Traceback" not in done.stderr, done.stderr
