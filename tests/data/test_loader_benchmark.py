"""The loader's benchmark runs, at a size that says nothing about speed."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loader.py"


@pytest.mark.soak  # it reads a whole benchmark
def test_it_prints_its_table_and_keeps_the_memory_bar():
    flags = ["--megabytes", "4", "--pairs", "1", "--max-blocks", "500"]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a bar of time was missed, which a busy machine may do
    rows = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()[-3:]}
    assert list(rows) == ["tokens/s over training's", "resident growth, MB", "resume, last over first"]
    assert "MISSED" not in rows["resident growth, MB"]
