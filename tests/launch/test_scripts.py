"""Each script ends in `forgather train` with the words that its kind of machine needs."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TRAIN = ["-m", "forgather", "train"]


@pytest.fixture
def run_script(tmp_path):
    """Runs a script with commands that only write down how they were called."""
    record = tmp_path / "called"
    for name in ("python3", "srun", "scontrol"):
        stand_in = tmp_path / name
        stand_in.write_text(
            "#!/bin/sh\n"
            f'{{ printf "%s\\n" {name} "$@"; echo; }} >> {record}\n'
            'if [ "$1 $2" = "show hostnames" ]; then echo node7; echo node8; fi\n'
            f"if [ {name} = srun ]; then exit ${{SRUN_CODE:-0}}; fi\n"
        )
        stand_in.chmod(0o755)

    def run(script: str, *words: str, **environ: str) -> tuple[int, list[list[str]], str]:
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python3"} | environ
        done = subprocess.run([str(LAUNCH / script), *words], env=environ, capture_output=True, text=True, check=False)
        calls = record.read_text().split("\n\n") if record.exists() else []
        return done.returncode, [call.strip().split("\n") for call in calls if call.strip()], done.stderr

    return run


def test_one_node(run_script):
    assert run_script("one_node.sh", "-p", "x") == (0, [["python3", *TRAIN, "-p", "x"]], "")


def test_several_nodes_that_meet(run_script):
    code, calls, _ = run_script("several_nodes.sh", "-p", "x", NODES="2:4", MEET="10.0.0.1:29500", MAX_RESTARTS="3")
    meeting = ["--nnodes", "2:4", "--rdzv-endpoint", "10.0.0.1:29500", "--max-restarts", "3"]
    assert (code, calls) == (0, [["python3", *TRAIN, *meeting, "-p", "x"]])


def test_several_nodes_with_numbers(run_script):
    code, calls, _ = run_script("several_nodes_static.sh", "-p", "x", NODES="2", NODE="1", FIRST="10.0.0.1")
    numbered = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "29500"]
    assert (code, calls) == (0, [["python3", *TRAIN, "-p", "x", "--", *numbered]])


@pytest.mark.parametrize(
    ("script", "environ", "said"),
    [
        ("several_nodes.sh", {"MEET": "10.0.0.1:29500"}, "how many hosts, 4 or 2:4"),
        ("several_nodes.sh", {"NODES": "2"}, "where the hosts meet"),
        ("several_nodes_static.sh", {"NODES": "2", "NODE": "0"}, "the address of host 0"),
    ],
)
def test_what_is_not_said_is_asked_for(run_script, script, environ, said):
    code, calls, stderr = run_script(script, **environ)
    assert (code != 0, calls) == (True, [])
    assert said in stderr


SLURM = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2"}


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_requeues_a_run_that_was_told_to_stop(run_script, code):
    ended, calls, _ = run_script("slurm.sh", "-p", "x", SRUN_CODE=str(code), **SLURM)
    started = ["--nnodes", "2", "--rdzv-endpoint", "node7:23456", "-p", "x"]
    assert calls[:2] == [
        ["scontrol", "show", "hostnames", "node[7-8]"],
        ["srun", "--kill-on-bad-exit=0", "--wait=120", "python3", *TRAIN, *started],
    ]
    assert calls[2:] == ([["scontrol", "requeue", "123456"]] if code == 75 else [])
    assert ended == (0 if code == 75 else code)
