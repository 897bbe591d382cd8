"""The benchmarks of models run, and memory, which no neighbour on the machine changes, stays below its bars."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WRITE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from llama_package import llama_package
llama_package(Path(sys.argv[2]) / "70B", "70B")
"""


def run(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a bar of time was missed, which a busy machine may do
    return done.stdout


@pytest.mark.soak  # a process of its own, measured
def test_70_billion_parameters_on_meta_take_hardly_more_memory_than_the_imports(tmp_path: Path) -> None:
    run("-c", WRITE, BENCHMARKS, tmp_path)
    found = json.loads(run(BENCHMARKS / "construct.py", "--figures=on_meta", "--shape=70B", f"--folder={tmp_path}"))
    assert found["parameters"] == 70_553_706_496
    assert found["peak_mb"] < 600


@pytest.mark.soak
def test_memory_of_construction_and_of_one_shard() -> None:
    lines = run(BENCHMARKS / "construct.py", "--pairs=1").splitlines()
    of_memory = [line for line in lines if "MB of the process" in line or "of the largest parameter" in line]
    assert len(of_memory) == 2
    assert all(line.endswith("  reached") for line in of_memory), "\n".join(lines)


@pytest.mark.soak
def test_our_llama_and_transformers_train_alike() -> None:
    lines = run(BENCHMARKS / "model_speed.py", "--dose").splitlines()
    assert len([line for line in lines if "equal losses" in line]) == 3, "\n".join(lines)
    errors = [line for line in lines if "error of the loss" in line]
    assert len(errors) == 2
    assert all(line.endswith("  reached") for line in errors), "\n".join(lines)
